"""Finds the topic of a sentence without a model: a short noun phrase recognised by the words around it.

Nothing here parses English. A phrase needs a word or capital letter that shows where it begins ("about", "the") and
something after it that shows where it ends; sentences without such a phrase have no topic.
"""
# ruff: noqa: SIM905 - word lists read best as text

import re

# Words that never occur in a noun phrase: pronouns, auxiliaries, question words, conjunctions, verbs of requests.
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
_DETERMINER = r"(?:the|a|an|my|your|his|her|our|their|its)"
_WORD = r"[A-Za-z][A-Za-z'’-]*[A-Za-z]"
# A determiner and up to four words; an "of" may add as many again.
_PHRASE = rf"(?:{_DETERMINER}\s+)?{_WORD}(?:\s+{_WORD}){{0,3}}"
_ABOUT = re.compile(
    rf"\b(?:about|regarding|concerning|discuss|(?:capital|history|meaning|purpose|benefits?|advantages?|causes?|"
    rf"importance|concept|role|life|impact|types?|kinds?) of)\s+({_PHRASE})(?=\s*(?:[.?!,;:]|$))",
    re.IGNORECASE,
)
_WHAT_IS = re.compile(
    rf"\b(?:what(?:'s| is| are| was| were)|explain|describe|define|who (?:is|was|are))\s+({_PHRASE}"
    rf"(?:\s+of\s+{_PHRASE})?)(?=\s*(?:[.?!,;:]|$))",
    re.IGNORECASE,
)
_OF = re.compile(rf"\b(the\s+{_WORD}\s+of\s+(?:the\s+)?{_WORD})(?=\s*(?:[.?!,;:]|$))", re.IGNORECASE)
# A name of several words, or of one word after a preposition.
_NAME = re.compile(
    r"(?:(?<=[a-z,] )(?=[A-Z]\S+ [A-Z])|(?<=\bto )|(?<=\bin )|(?<=\bfrom )|(?<=\babout ))"
    r"([A-Z][a-z]{2,}(?:\s+[A-Z][a-z]+){0,2})(?=[.?!,;:]\s|\s*[.?!]?$|\s(?:is|are|and|with|like|when|for)\s)"
)
_VERBAL = re.compile(r"(?:[a-z]{2}ed|ize|ify|ingly|ously|ally|ely|ily|ous|ful|less|able|ible)$", re.IGNORECASE)
# Nouns that mean nothing without their context.
_VAGUE = frozenset(
    """
    way ways thing things lot kind sort bit time times day days year years reason question questions answer example
    examples problem problems difference differences idea ideas topic sentence sentences text list following same one
    ones use number part point case other others word words people person information details sure issue option options
    step steps minute moment meaning purpose process result results place here there it this that main fan effect
    effects following concept probability calculations couple fraction tomorrow yesterday today
    benefit amount earlier later latest monday teeth boxes documents
    """.split()
)


def topic(text: str) -> str | None:
    """A short noun phrase that says what `text` is about, such as "the capital of Italy"; None if none is clear."""
    text = " ".join(text[:400].split())
    for pattern in (_ABOUT, _WHAT_IS, _NAME, _OF):
        for match in pattern.finditer(text):
            phrase = match.group(1)
            if pattern is _ABOUT and " of " in match.group() and not match.group().lower().startswith("about"):
                phrase = f"the {match.group()}"
            if _is_phrase(phrase):
                first, _, rest = phrase.partition(" ")
                return f"{first.lower()} {rest}" if re.fullmatch(_DETERMINER, first, re.IGNORECASE) and rest else phrase
    return None


def _is_phrase(phrase: str) -> bool:
    words = phrase.lower().replace("’", "'").split()
    if words and re.fullmatch(_DETERMINER, words[0]):
        words = words[1:]
    content = [w for w in words if w not in ("of", "the", "a", "an", "and", "in", "my", "your")]
    return (
        bool(content)
        and not any(w in _STOP for w in content)
        and not any(_VERBAL.search(w) for w in content)
        and content[-1] not in _VAGUE
        and (phrase[-2:] != "ly" or phrase.split()[-1][0].isupper() or content[-1] == "family")
        and not (len(content) > 1 and content[0] in _VAGUE)
        and (len(content) > 1 or len(content[0]) > 3)
    )
