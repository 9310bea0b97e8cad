"""Messages in the form of tests and exercises: multiple choice, word problems, few-shot examples.

The content is our own or a topic's phrases (`assets/questions.txt`); what matters is the form, in which an answer must
fit its question.
"""
# ruff: noqa: SIM905 - word lists read best as text

import random
from collections.abc import Callable, Sequence

from data_gen.questions import topics

_ASKS = (
    "Which of these has to do with {topic}?",
    "Which of the following belongs to the topic of {topic}?",
    "One of these is about {topic}. Which one?",
    "What would you look up in a book about {topic}?",
    "Which word or phrase goes with {topic}?",
)
_BEHIND = ("", "", "\nAnswer:", "\nWhich one is it?", "\nGive the letter only.", "\nThe answer is", "\nChoose one.")
_MARKS: Sequence[Callable[[int], str]] = (
    lambda i: "ABCD"[i] + ". ",
    lambda i: "(" + "ABCD"[i] + ") ",
    lambda i: "ABCD"[i] + ") ",
    lambda i: f"{i + 1}. ",
    lambda i: "- ",
    lambda i: "abcd"[i] + ") ",
)
_NAMES = tuple("Anna Tom Lucy Omar Grace Leo Nina Paul Ivy Sam Rosa Ben Mia Hugo Ella Max Zoe Carl Jane Ravi".split())
_THINGS = tuple("apples pencils books eggs coins stickers marbles tickets cookies flowers stamps cards shells".split())
_OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("early", "late"),
    ("happy", "sad"),
    ("loud", "quiet"),
    ("heavy", "light"),
    ("wet", "dry"),
    ("old", "young"),
    ("strong", "weak"),
    ("cheap", "expensive"),
    ("empty", "full"),
    ("dark", "bright"),
    ("hard", "soft"),
    ("near", "far"),
    ("high", "low"),
    ("open", "closed"),
    ("rich", "poor"),
)
_PLURALS = (
    ("dog", "dogs"),
    ("box", "boxes"),
    ("child", "children"),
    ("leaf", "leaves"),
    ("city", "cities"),
    ("mouse", "mice"),
    ("knife", "knives"),
    ("foot", "feet"),
    ("baby", "babies"),
    ("bus", "buses"),
)
_REVIEWS = (
    ("The soup was cold and the waiter was rude.", "negative"),
    ("We loved every minute of the show.", "positive"),
    ("The battery died after two days.", "negative"),
    ("It fits perfectly and looks great.", "positive"),
    ("I would not stay there again.", "negative"),
    ("The staff were kind and the room was clean.", "positive"),
    ("A waste of money.", "negative"),
    ("Best pizza in town!", "positive"),
    ("The plot made no sense.", "negative"),
    ("My kids play with it every day.", "positive"),
)


def _phrases() -> dict[str, list[str]]:
    found = {name: [p for kind in ("tell", "what") for p in kinds.get(kind, ())] for name, kinds in topics().items()}
    return {name: phrases for name, phrases in found.items() if phrases}


def options(rng: random.Random) -> str:
    """A multiple-choice question with three or four options, one of them right."""
    found = _phrases()
    topic, *others = rng.sample(sorted(found), 4)
    items = [rng.choice(found[name]) for name in (topic, *others)][: rng.choice((3, 4, 4))]
    rng.shuffle(items)
    mark = rng.choice(_MARKS)
    between = rng.choice(("\n", "\n", " "))
    front = rng.choice(("", "", "Question: ", "Q: ", "Answer the following question.\n"))
    question = rng.choice(_ASKS).format(topic=topic)
    listed = between.join(mark(i) + item for i, item in enumerate(items))
    return f"{front}{question}{between}{listed}{rng.choice(_BEHIND)}"


def sums(rng: random.Random) -> str:
    """A word problem of one or two steps."""
    a, b, c = rng.randint(3, 40), rng.randint(2, 12), rng.randint(2, 9)
    name, other = rng.sample(_NAMES, 2)
    thing = rng.choice(_THINGS)
    problem = rng.choice(
        (
            f"{name} has {a + b} {thing} and gives {b} of them to {other}. How many {thing} does {name} have left?",
            f"{name} buys {b} bags with {c} {thing} in each. How many {thing} does {name} have?",
            f"There are {a} {thing} in a box. {name} puts {b} more in, and then {other} takes {c} out. How many are "
            "in the box now?",
            f"{name} reads {b} pages every day. How many pages does {name} read in {c} days?",
            f"A ticket costs {b} dollars. {name} buys {c} tickets and pays with a fifty dollar bill. How much change "
            "is that?",
            f"{name} is {b} years old and {other} is {c} years older. How old is {other}?",
            f"{b * c} {thing} are shared equally among {c} children. How many does each child get?",
            f"What is {a} plus {b} times {c}?",
            f"{name} walks {b} miles in the morning and {c} miles in the evening. How far is that in a week?",
        )
    )
    front = rng.choice(("", "", "", "Question: ", "Q: ", "Solve this problem. ", "Problem:\n"))
    return front + problem + rng.choice(("", "", "", "\nAnswer:", " Think step by step.", "\nA:", "\nLet's think."))


def examples(rng: random.Random) -> str:
    """Two to four examples of a task, followed by the task itself."""
    table, names = rng.choice(
        (
            (_OPPOSITES, (("Word", "Opposite"), ("Q: What is the opposite of", "A"), ("Input", "Output"))),
            (_PLURALS, (("Singular", "Plural"), ("Input", "Output"), ("One", "Many"))),
            (_REVIEWS, (("Review", "Sentiment"), ("Text", "Label"), ("Sentence", "Feeling"))),
            (
                tuple((f"{a} + {b}", str(a + b)) for a in range(3, 30, 4) for b in range(2, 20, 5)),
                (("Question", "Answer"), ("Q", "A"), ("Sum", "Result")),
            ),
        )
    )
    question, answer = rng.choice(names)
    shown = rng.sample(table, rng.randint(3, 5))
    lines = [f"{question}: {q}\n{answer}: {a}" for q, a in shown[:-1]]
    last = f"{question}: {shown[-1][0]}" + rng.choice((f"\n{answer}:", f"\n{answer}:", ""))
    front = rng.choice(("", "", "Here are some examples.\n\n", "Go on in the same way.\n\n"))
    return front + rng.choice(("\n\n", "\n")).join([*lines, last])
