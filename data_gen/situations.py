"""Users' turns other than questions: corrections, requests for more or less, replies, two questions, counting.

Each situation is a short plan of turns. If the spoken words are not a question by themselves ("No, I meant Austria."),
`asked` gives the model the full question.
"""
# ruff: noqa: SIM905 - word lists read best as text

import random
from typing import NamedTuple

from data_gen.questions import topics


class Turn(NamedTuple):
    """A user's turn.

    Attributes:
        said: the words.
        asked: what the model is asked instead; by default the words themselves.
        answer: an answer that needs no model; `SAME` repeats the previous answer.
    """

    said: str
    asked: str = ""
    answer: str = ""


SAME = "\0"
_MORE = ("Go on.", "Please go on.", "Tell me more.", "More, please.", "And then?", "Continue, please.", "What else?",
         "Can you go on?", "Keep going.", "Is there more?", "And?", "Say more about that.")  # fmt: skip
_SHORTER = ("Shorter, please.", "Can you make it shorter?", "The short version, please.", "In one sentence, please.",
            "Too long. Say it shorter.", "Briefly, please.", "Just the main point.", "Can you sum that up?",
            "That was a lot. What's the main thing?")  # fmt: skip
_AGAIN = ("What did you say?", "Sorry, can you repeat that?", "Say that again, please.", "Pardon?", "Sorry, what?",
          "I didn't hear you.", "Can you say that once more?", "Again, please.", "Come again?", "I missed that.",
          "Could you repeat what you said?")  # fmt: skip
_SIMPLER = ("Simpler, please.", "I don't understand.", "Can you explain it like I'm five?", "That's too complicated.",
            "In plain words, please.", "I didn't get that. Can you put it another way?")  # fmt: skip
_CORRECT = ("No, I meant {new}.", "Sorry, I meant {new}.", "Not {old}, {new}.", "No, {new}.",
            "I said {new}, not {old}.",
            "Wait, I mean {new}.", "Oh, sorry, {new}, not {old}.", "That's not it. I was asking about {new}.",
            "Actually, I meant {new}.", "No no, {new}.", "I misspoke. I meant {new}.", "Make that {new}.")  # fmt: skip
_FORMS = {
    "tell": ("Tell me about {}.", "What can you tell me about {}?", "I'd like to know more about {}.",
             "What do you know about {}?", "Do you know anything about {}?"),
    "what": ("What is {}?", "Can you explain what {} is?", "What's {}?", "Tell me what {} is."),
}  # fmt: skip
_PLACES = ("What's the capital of {}?", "Where is {}?", "Tell me something about {}.", "What do people eat in {}?",
           "What language do they speak in {}?", "What is {} known for?")  # fmt: skip
# What somebody says to whom they talk already: agreement, doubt, what they are asked for, a short question.
_REPLY = (
    "Okay, {thing} works for me.|Yes, {thing} is fine.|No, not {thing}.|I'd rather have {thing}.|I'll take {thing}.|"
    "Let's go with {thing}.|{thing}, please.|I think {thing} would be better.|I'm not sure about {thing}.|"
    "I already have {thing}.|I don't need {thing}.|We could try {thing}.|Maybe we should take {thing}.|"
    "Put {thing} on the list.|It's for {who}.|My name is {name}.|{name} can help me with it.|I was there with {who}.|"
    "I talked to {who} about it.|{who_} told me the same thing.|{who_} would love that.|I'll be there at {time}.|"
    "It starts at {time}.|The train leaves at {time}.|We meet at {time}.|Set it for {time}.|Can you make it {time}?|"
    "My number is {number} {number}.|The code is {number}.|There are {small} of us.|I need {small} of them.|"
    "It costs about {number} dollars.|I live at {number} {street}.|The office is on {street}.|It's near {street}.|"
    "Yes, I agree with you.|No, I don't like that.|That's a good point.|That's not what I wanted.|That's really nice.|"
    "That sounds difficult.|That was very helpful.|I see what you mean.|I understand now.|I'll think about it.|"
    "Give me a minute to think.|Just a second, I'm writing that down.|I have to go soon.|I'll try that tonight.|"
    "We did that last time.|It doesn't work for me.|It still doesn't work.|I've tried that already.|I hope so.|"
    "I have no idea.|You're right about that.|I can't do that today.|I'm ready when you are.|I'm almost done.|"
    "Everything is fine now.|The meeting went really well.|{who_} is coming to visit.|Nobody told me about {thing}.|"
    "The {noun} is broken again.|The {noun} looks great.|My {noun} is too old.|I can't find my {noun}.|"
    "I just bought a new {noun}.|This {noun} is much better.|The {noun} works again now.|I left my {noun} at home.|"
    "Would that be enough?|Should I do that now?|Is that a good idea?|Do you agree with me?|Could we do it later?|"
    "Are you sure about that?|Can I do it myself?|Does {who} need to know?|Will it take long?|So is it {thing}?|"
    "What about {thing}?|How about {thing} instead?|Would you take {thing}?|Is {time} too late?"
).split("|")
_SLOTS = {
    "thing": "the first one|the second one|the small one|the red one|the cheaper one|the other one|the blue one|both|"
    "tea|a salad|rice|soup|an early flight|the bus|the longer way|the weekend|Monday|Friday|next month|"
    "two tickets|a window seat|the garden|bread and cheese|a taxi|the morning|a shorter name".split("|"),
    "who": "my sister|my brother|my wife|my husband|my boss|my teacher|my neighbor|my parents|my son|my daughter|"
    "a friend|my doctor|the whole family|my team".split("|"),
    "name": "Anna Tom Maria David Lucy Peter Nina Carlos Emma Ben".split(),
    "time": "noon|five|six thirty|ten in the morning|half past eight|a quarter to nine|midnight".split("|"),
    "number": [str(n) for n in range(11, 900, 7)],
    "small": "two three four five six seven eight nine ten twelve".split(),
    "street": "Park Street|Main Street|Hill Road|King Street|Station Road|Garden Lane|River Road".split("|"),
    "noun": "phone bike lamp computer jacket printer radio umbrella key camera bag watch coat ticket".split(),
}
_COUNTRIES = (
    "France Italy Spain Peru Japan Egypt Canada Norway Greece India China Kenya Cuba Poland Austria Ireland Portugal "
    "Sweden Denmark Finland Brazil Mexico Chile Turkey Thailand Hungary Belgium Iceland Morocco Australia Vietnam"
).split()
_ONES = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_LISTS = {
    ("Name the days of the week.", "What are the days of the week?", "Say the days of the week."):
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
    ("Name the months of the year.", "What are the twelve months?", "List the months, please."):
        "January, February, March, April, May, June, July, August, September, October, November and December.",
    ("Say the alphabet.", "Can you say the alphabet?", "Spell out the alphabet for me."):
        "A, B, C, D, E, F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V, W, X, Y, Z.",
    ("Name the seasons.", "What are the four seasons?"): "Spring, summer, autumn and winter.",
    ("Name the planets.", "What are the planets of our solar system?", "List all planets."):
        "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.",
    ("Name the colors of the rainbow.", "What colors does a rainbow have?"):
        "Red, orange, yellow, green, blue, indigo and violet.",
    ("Name the continents.", "What are the seven continents?"):
        "Africa, Antarctica, Asia, Australia, Europe, North America and South America.",
}  # fmt: skip
_COUNT = ("Count from {a} to {b}.", "Can you count from {a} to {b}?", "Please count to {b}, starting at {a}.",
          "Count aloud from {a} up to {b}, please.", "Say the numbers from {a} to {b}.")  # fmt: skip


def situation(rng: random.Random) -> list[Turn]:
    """A plan of one to three turns."""
    makers = (_correction, _follow_up, _reply, _listing, _two_at_once, _context)
    made = rng.choices(makers, (0.27, 0.27, 0.25, 0.07, 0.07, 0.07))[0](rng)
    if rng.random() < 0.15:
        made.append(Turn(rng.choice(_AGAIN), answer=SAME))
    return made


def _phrases(rng: random.Random, kind: str) -> list[str]:
    """Phrases of one random topic that has at least two of this kind."""
    found = [kinds[kind] for kinds in topics().values() if len(kinds.get(kind, ())) > 1]
    return list(rng.choice(found))


def _correction(rng: random.Random) -> list[Turn]:
    if rng.random() < 0.3:
        form, (old, new) = rng.choice(_PLACES), rng.sample(_COUNTRIES, 2)
    else:
        kind = rng.choice(("tell", "what"))
        form = rng.choice(_FORMS[kind])
        old, new = rng.sample(_phrases(rng, kind), 2)
    words = rng.choice(_CORRECT).format(old=old, new=new)
    return [Turn(form.format(old)), Turn(words, asked=form.format(new))]


def _follow_up(rng: random.Random) -> list[Turn]:
    kind = rng.choice(("tell", "what", "ask"))
    phrase = rng.choice(_phrases(rng, kind))
    first = Turn(phrase if kind == "ask" else rng.choice(_FORMS[kind]).format(phrase))
    follow = rng.choice(
        (
            Turn(rng.choice(_MORE), asked="Tell me more about that."),
            Turn(rng.choice(_SHORTER), asked="Say that again in one short sentence."),
            Turn(rng.choice(_AGAIN), answer=SAME),
            Turn(rng.choice(_SIMPLER), asked="Can you say that again in simpler words?"),
        )
    )
    return [first, follow]


def _reply(rng: random.Random) -> list[Turn]:
    """A reply by itself, as when the talk goes on from before, or behind a question and its answer."""
    drawn = {slot: rng.choice(words) for slot, words in _SLOTS.items()}
    said = rng.choice(_REPLY).format(**drawn, who_=drawn["who"].capitalize())
    before = [Turn(rng.choice(_phrases(rng, "ask")))] if rng.random() < 0.4 else []
    return [*before, Turn(said[0].upper() + said[1:])]


def _listing(rng: random.Random) -> list[Turn]:
    if rng.random() < 0.5:
        questions = rng.choice(list(_LISTS))
        return [Turn(rng.choice(questions), answer=_LISTS[questions])]
    a = rng.choice((1, 1, 1, rng.randint(1, 10)))
    b = rng.randint(a + 3, min(a + 14, 20))
    text = ", ".join(_ONES[a - 1 : b]) + "."
    shown = rng.choice((lambda n: str(n), lambda n: _ONES[n - 1]))
    return [Turn(rng.choice(_COUNT).format(a=shown(a), b=shown(b)), answer=text[0].upper() + text[1:])]


def _two_at_once(rng: random.Random) -> list[Turn]:
    first, second = rng.sample(_phrases(rng, "ask"), 2)
    link = rng.choice((" ", " And ", " Also, "))
    if link != " " and not second.startswith("I "):
        second = second[0].lower() + second[1:]
    return [Turn(first + link + second)]


def _context(rng: random.Random) -> list[Turn]:
    found = [kinds for kinds in topics().values() if kinds.get("ask") and kinds.get("say")]
    kinds = rng.choice(found)
    return [Turn(f"{rng.choice(kinds['ask'])} {rng.choice(kinds['say'])}")]
