"""The topic of a sentence without a model: its longest short noun phrase, found by leaving out what nouns are not."""
# ruff: noqa: SIM905 - word lists read best as text

import re

# Words that end a noun phrase: pronouns, auxiliaries, question words, conjunctions, and verbs of requests.
_STOP = frozenset(
    """
    i you he she it we they me him us them myself yourself this that these those who whom whose which what when where
    why how there here am is are was were be been being do does did done doing have has had having can could will would
    shall should may might must ought need let lets let's i'm i've i'd i'll it's that's what's how's who's there's
    you're you've they're we're don't doesn't didn't isn't aren't wasn't can't couldn't won't wouldn't shouldn't and or
    but nor so yet if then than because since although though while whereas unless until as not no yes please okay ok
    sure thanks thank hello hi hey well just also too very really quite more most much many some any all each every
    both either neither other another such same only even still already again ever never always often sometimes usually
    now today maybe perhaps actually basically essentially first second next finally however therefore thus about above
    after against along among around at before behind below beneath beside between beyond by despite down during except
    from inside into like near off on onto out outside over past through throughout to toward towards under up upon via
    within without with regarding tell give gives given explain describe write create provide suggest recommend list
    show help make makes made know think thinks want wants wanted like liked find found get gets got go goes going come
    comes say says said see use uses used using used work works mean means share talk discuss compare summarize
    translate rewrite generate design develop implement consider calculate determine solve explore elaborate identify
    add take takes taken keep start starts stop try tried look looking feel feels become becomes include includes
    including called known involve involves contain contains help helps ensure allow allows cause causes lead leads
    affect affects apply applied based considered believe able good best better new one two three few several
    certainly absolutely great interesting nice wonderful perfect true right wrong possible specific specifically
    something anything everything nothing someone anyone thing things way ways lot lots kind sort bit follow follows
    following ask asked answer happen happens happened remember understand learn i'd could've interested
    accurate considering
    """.split()
)
_JOIN = frozenset("of the a an my your his her its our their for in".split())
_DETERMINERS = frozenset("the a an my your his her its our their".split())
_TOKEN = re.compile(r"[^\W_](?:[\w'’.+#-]*[\w+#])?|[^\w\s]")
_SPACED = re.compile(r"[^\W\d_]")
_VERBAL = re.compile("(?:ing|ed|ize|ise|ify)$")
_MAX_WORDS = 7


def topic(text: str) -> str:
    """A short noun phrase that says what `text` is about, such as "the capital of Italy".

    Longer phrases and names win; the first of equals. Text in a script without spaces gives its opening clause.
    Never blank for text that holds a letter or digit; has no bracket.
    """
    text = text[:1000]
    phrases: list[list[str]] = []
    current: list[str] = []
    for token in [*_TOKEN.findall(text), "."]:
        word = token.lower().replace("’", "'")
        if not token[0].isalnum() or word in _STOP or (word.endswith("ly") and len(word) > 5):
            phrases.append(current)
            current = []
        else:
            current.append(token)
    found = [p for p in map(_trim, phrases) if p]
    if not found:
        return " ".join(text.translate(_NO_BRACKETS).split()[:4]).strip(" .?!,;:") or "this"
    best = max(found, key=_score)
    phrase = " ".join(best)
    if not phrase.isascii() and len(phrase) > 24 and len(best) == 1:
        phrase = phrase[:12]
    return phrase


_NO_BRACKETS = str.maketrans("", "", "[]{}")


def _trim(words: list[str]) -> list[str]:
    """Drops verb forms and prepositions in front, joining words at the end, and whatever is beyond `_MAX_WORDS`."""
    start = next((i for i, w in enumerate(words) if w.lower() in _DETERMINERS), 0)
    if any(_VERBAL.search(w.lower()) for w in words[:start]):
        words = words[start:]
    while words and words[0].lower() in _JOIN - _DETERMINERS:
        words = words[1:]
    words = words[:_MAX_WORDS]
    while words and words[-1].lower() in _JOIN:
        words = words[:-1]
    if words:
        first = words[0].lower() if words[0].lower() in _DETERMINERS else words[0]
        words = [first, *words[1:-1], *([words[-1].removesuffix("'s")] if len(words) > 1 else [])]
    content = [w for w in words if w.lower() not in _JOIN and _SPACED.search(w)]
    return words if content else []


def _score(words: list[str]) -> float:
    content = [w for w in words if w.lower() not in _JOIN]
    names = sum(w[0].isupper() for w in words[1:])
    # One word that looks like an adverb or a bare verb form says little.
    weak = len(content) == 1 and content[0].lower().endswith(("ly", "ing", "ed"))
    return min(len(content), 4) + 0.5 * (names > 0) + 0.4 * (words[0].lower() in _DETERMINERS) - weak
