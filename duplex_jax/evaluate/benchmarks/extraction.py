"""Extracts the answer from generated text and scores it, by UltraEval's rules for its generation tasks.

An extractor (`..._post`) reduces an output to the part that is compared; a metric (`..._match`) compares it. Outputs
continue after the answer with questions that the model makes up, because only their length is limited.
"""

import re

from duplex_jax.evaluate.sandbox import Program, with_tests

# Ends of a HumanEval completion: the next top-level statement.
_HUMANEVAL_ENDS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "<|endoftext|>")

_CONCLUSION = re.compile(r"\b(?:final answer|therefore|thus|hence)\b", re.IGNORECASE)
_MATH_SPAN = re.compile(r"(?<!\\)\$(.+?)(?<!\\)\$", re.DOTALL)
# Units of answers; those of single letters only inside `\text`, because they would otherwise be variables.
_UNITS = (
    r"square|sq|cubic|units?|inch(?:es)?|foot|feet|ft|yards?|miles?|mph|mm|cm|km|met(?:er|re)s?|kg|gm|grams?|pounds?|lbs?"
    r"|dollars?|cents?|percent|hours?|minutes?|seconds?|days?|weeks?|months?|years?|degrees?|points?|digits?|integers?"
    r"|ways?|multiples?|edges?|students?|teachers?|people|children|tickets?|meals?"
)
_UNIT = re.compile(rf"(?<![A-Za-z\\])(?:{_UNITS})(?![A-Za-z])\.?\s*(?:\^\{{?[23]\}}?)?")
_TEXT_UNIT = re.compile(rf"(?:(?:{_UNITS}|[mgs])[\s.]*)+")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|overline)\s*\{([^{}]*)\}(\^\{?[23]\}?)?")
_SUBSTITUTIONS = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"(?<!\\)\\[!,;: ]|~|\\q?quad(?![A-Za-z])", " "),  # spaces
        (r"\{,\}", ","),
        (r"\\?[$%]|\"|\\l?dots(?![A-Za-z])|\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?", ""),
        (r"\\(?:left|right)(?![A-Za-z])", ""),
        (r"\\[dtc]frac", r"\\frac"),
        (r"(?<![A-Za-z\\])\f?f?rac(?![A-Za-z])", r"\\frac"),  # the backslash was lost, or `\f` was read as a form feed
        (r"\\([lgn])eq(?![A-Za-z])", r"\\\1e"),
        (r"\\mbox", r"\\text"),
    )
]


def prefix_match(output: str, gold: str) -> bool:
    """Whether the output begins with the gold answer, ignoring outer white space of both."""
    return output.strip().startswith(gold.strip())


def qa_match(output: str, gold: str, option: str) -> bool:
    """Whether the first letter in the output's first line is the gold one, or the output begins with the right option.

    Args:
        output: the model's output.
        gold: the letter in parentheses, such as `(C)`.
        option: the text of the right option.
    """
    output, option = output.strip(), option.strip()
    if option and output.startswith(option):
        return True
    for word in output.partition("\n")[0].split():
        if named := re.fullmatch(r"\(([A-Z])\)|([A-Z])", word.removesuffix(".")):
            return f"({named[1] or named[2]})" == gold
    return False


def exact_match(output: str, gold: str) -> bool:
    """Whether both are equal, and not empty, after all white space is removed."""
    output, gold = "".join(output.split()), "".join(gold.split())
    return bool(output) and output == gold


def bbh_post(output: str) -> str:
    """The first paragraph, from after its last "answer is", without a final "."."""
    paragraph = re.split(r"\n\s*\n", output.strip(), maxsplit=1)[0]
    return paragraph.rpartition("answer is")[2].strip().removesuffix(".").rstrip()


def gsm8k_post(output: str) -> str:
    """The number after `####`, or a substitute if a chain of thought ends differently.

    Without `####` it is the word after the last `>>`, else after the last `=`, else the last word made of digits only,
    else empty. The first `####` counts, because the next question begins after it. `$`, `,` and a final `.` are
    removed.
    """
    if marked := re.search(r"#### (-?[0-9.,]+)", output):
        return _plain_number(marked[1])
    for mark in (">>", "="):
        _, found, rest = output.rpartition(mark)
        if found and rest.split():
            return _plain_number(rest.split()[0])
    return next((word for word in reversed(output.split()) if word.isdigit()), "")


def _plain_number(word: str) -> str:
    return word.replace("$", "").replace(",", "").rstrip(".")


def math_post(output: str) -> str:
    """The normalised answer of a solution; empty for an empty output.

    It is searched in the last sentence with "final answer", "therefore", "thus" or "hence", else in the first sentence.
    A sentence ends with its line, or with a "." before white space.
    """
    sentences = [s for line in output.split("\n") for s in re.split(r"\.(?=\s|$)", line) if s.strip()]
    found = next((s for s in reversed(sentences) if _CONCLUSION.search(s)), sentences[0] if sentences else "")
    return normalise_math(re.split(r"\banswer is\b", found, flags=re.IGNORECASE)[-1])


def boxed(solution: str) -> str | None:
    r"""The content of the last `\boxed{...}`, with matched braces; None without one."""
    start = solution.rfind("\\boxed{") + len("\\boxed")
    end = _argument_end(solution, start) if start >= len("\\boxed") else None
    return None if end is None else solution[start + 1 : end - 1]


def normalise_math(answer: str) -> str:
    r"""A canonical spelling of answers that differ in typesetting, similar to Minerva's evaluation.

    Uses the boxed part, else the last `$...$`, else everything. Removes units, articles, spaces and percent signs,
    commas between thousands, and a short left side of an equation; replaces `\text` and similar commands by their
    words, and "and" by a comma; completes `\frac12`, `1/2`, `\sqrt2` and `.5` with braces and a zero.
    """
    inner = boxed(answer)
    spans = _MATH_SPAN.findall(answer)
    s = inner if inner is not None else spans[-1] if spans else answer
    for pattern, new in _SUBSTITUTIONS:
        s = pattern.sub(new, s)
    s = _TEXT.sub(_words, s)
    s = re.sub(r"(?<![A-Za-z\\])and(?![A-Za-z])", ",", s)
    s = re.sub(r"(?<![A-Za-z0-9\\])(?:an?|the)\s+(?=[A-Za-z]{2})", "", s)
    s = _UNIT.sub("", s)
    s = "".join(s.split()).lstrip(":").rstrip(".,")
    s = re.sub(r"(?<=\d)th$", "", re.sub(r",+", ",", s))
    s = _with_braces(_with_braces(s, "\\frac", 2), "\\sqrt", 1)
    if equation := re.fullmatch(r"[^=]{1,2}=([^=]+)", s):
        s = equation[1]
    s = re.sub(r"(?<![\d.])\.(?=\d)", "0.", s)
    s = re.sub(r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", s)
    return s.replace(",", "") if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", s) else s


def _words(match: re.Match[str]) -> str:
    r"""The words of a `\text{...}`; empty if they are units, including their exponent."""
    return " " if _TEXT_UNIT.fullmatch(match[1].strip()) else f" {match[1]} {match[2] or ''}"


def _argument_end(s: str, start: int) -> int | None:
    """Where the TeX argument that begins at `start` ends: a group in braces, a command, or one character."""
    if start >= len(s):
        return None
    if s[start] == "\\":
        command = re.compile(r"\\(?:[A-Za-z]+|.)").match(s, start)
        return command.end() if command else None
    if s[start] != "{":
        return start + 1
    depth = 0
    for i in range(start, len(s)):
        depth += (s[i] == "{") - (s[i] == "}")
        if not depth:
            return i + 1
    return None


def _with_braces(s: str, command: str, arguments: int) -> str:
    """Adds missing braces around a command's arguments."""
    at = s.find(command)
    while at >= 0:
        start = at = at + len(command)
        if command == "\\sqrt" and s[start : start + 1] == "[":
            start = s.find("]", start) + 1 or len(s)
        for _ in range(arguments):
            end = _argument_end(s, start)
            if end is None:
                break
            if s[start] != "{":
                s = f"{s[:start]}{{{s[start:end]}}}{s[end:]}"
                end += 2
            start = end
        at = s.find(command, at)
    return s


def humaneval_post(output: str) -> str:
    """The body of the function: everything before the next top-level statement."""
    ends = [at for mark in _HUMANEVAL_ENDS if (at := output.find(mark)) >= 0]
    return output[: min(ends, default=len(output))]


def new_mbpp_post(output: str) -> str:
    '''The code before the next problem, which begins with an unindented `"""`.'''
    return re.split(r'^"""', output, maxsplit=1, flags=re.MULTILINE)[0]


def program(head: str, completion: str, tests: str) -> Program:
    """A program that ends without an exception if and only if the completion passes the tests.

    Args:
        head: what the completion continues, such as a function's first lines.
        completion: code, as extracted from an output.
        tests: code to run after it.
    """
    return with_tests(f"{head}{completion}", tests)
