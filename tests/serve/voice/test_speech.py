"""Slices joined into speech: nothing lost, nothing twice, and what was heard is known to the character."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.speech import gap_at, player_waits, word_errors
from duplex_jax.errors import UserError
from duplex_jax.serve.voice.speech import Speaker, left_context, ready, speakable
from duplex_jax.serve.voice.tts import EspeakSynthesizer, GoogleSynthesizer, load_synthesizer, place_words
from tests.serve.voice.fakes import Letters, letters

TEXT = "It is famous for the tower, its museums and its food. Many people go, year after year. Do you?"


def test_a_word_that_may_go_on_waits():
    for text, spoken in (
        ("It is famous for the mus", "It is famous for the"),
        ("famous for the tower, its", "famous for the tower,"),
        ("famous for the tower, its mus", "famous for the tower,"),
        ("famous for the tower, its museums and", "famous for the tower, its museums"),
        ("It is famous.", "It is famous."),
        ('He said "yes."', 'He said "yes."'),
        ("It was seen by Dr.", "It was seen by"),
        ("It costs about 3.", "It costs about"),
        ("First of all\n", "First of all\n"),
        ("You are", ""),
        ("", ""),
        ("x" * 50, "x" * 50),
    ):
        assert text[: ready(text)] == spoken


def test_the_left_context_stays_in_its_sentence():
    assert left_context("one two three four five") == "two three four five"
    assert left_context("Yes. It is") == "It is"
    assert left_context("It is done.") == ""
    assert left_context("I saw Dr. Who") == "I saw Dr. Who"
    assert left_context("") == ""


def test_marks_are_not_spoken_and_keep_their_place():
    for text in ("**Bold** and `code` 🙂 [x](y)", "- one\n- two", "A title\n\nAnd text", "a_b"):
        assert len(speakable(text)) == len(text)
    assert speakable("**Bold** 🙂") == "  Bold    "
    assert speakable("A title\n\nAnd") == "A title.\nAnd"
    assert speakable("- one\n- two") == "  one.  two"


def cut(text: str, sizes: list[int]) -> list[str]:
    places = [0, *np.cumsum(sizes).tolist()]
    parts = [text[a:b] for a, b in itertools.pairwise(places)] + [text[places[-1] :]]
    return [p for p in parts if p]


@settings(deadline=None)
@given(st.lists(st.integers(3, 40), max_size=10), st.booleans())
def test_slices_are_spoken_whole_and_once(sizes: list[int], ends_idle: bool):
    voice = Letters()
    speaker, slices = Speaker(voice), cut(TEXT, sizes)
    pcm = [speaker.say(s, last=not ends_idle and i == len(slices) - 1) for i, s in enumerate(slices)]
    if ends_idle:
        pcm.append(speaker.say(None))
    said = np.concatenate(pcm)
    # At a join a few milliseconds are faded, so letters are counted with their neighbours' help.
    assert letters(said) == TEXT.replace(" ", "")
    # Every sample has its place in the text, from the first word to the last.
    assert speaker.heard(len(said)) == (len(slices) - 1, len(slices[-1]))
    assert speaker.heard(0) is None
    starts = np.cumsum([0, *map(len, slices)])
    before = 0
    for n in range(0, len(said), 997):
        place = speaker.heard(n)
        end = 0 if place is None else int(starts[place[0]]) + place[1]
        assert before <= end
        # Heard words were given out: all letters of them are in the sound up to here.
        heard = letters(said[:n])
        assert heard.startswith(TEXT[:end].replace(" ", ""))
        assert place is None or 0 < place[1] <= len(slices[place[0]])
        before = end


def test_a_voice_without_times_is_cut_where_the_left_part_ends():
    speaker = Speaker(Letters(timed=False))
    slices = ["Some words that", " are said in", " pieces of three."]
    said = np.concatenate([speaker.say(s) for s in slices])
    assert letters(said) == "".join(slices).replace(" ", "")
    assert speaker.heard(len(said)) == (2, len(slices[2]))
    index, characters = speaker.heard(len(said) // 2) or (-1, 0)
    assert index == 1
    assert characters > 0


def test_context_stands_on_both_sides():
    voice = Letters()
    speaker = Speaker(voice)
    speaker.say("It is famous for the")
    speaker.say(" big tower, its")
    assert voice.texts == ["It is famous for the and so on", "It is famous for the big tower, its and so on"]


def test_idle_slices_count_and_speak_what_was_held():
    speaker = Speaker(Letters())
    assert speaker.say(None).size == 0
    first = speaker.say("Hello to you")
    assert letters(first) == "Helloto"
    rest = speaker.say(None)
    assert letters(rest) == "you"
    assert speaker.say(None).size == 0
    more = speaker.say(" Bye.")
    assert speaker.heard(len(first)) == (1, len("Hello to"))
    assert speaker.heard(len(first) + len(rest)) == (1, len("Hello to you"))
    assert speaker.heard(len(first) + len(rest) + len(more)) == (4, len(" Bye."))


def test_cancel_forgets_what_was_not_given():
    speaker = Speaker(Letters())
    first = speaker.say("One two three four")
    speaker.cancel()
    after = speaker.say(" Well, yes.")
    assert letters(after) == "Well,yes."
    assert speaker.heard(len(first)) == (0, len("One two three"))
    assert speaker.heard(len(first) + len(after)) == (1, len(" Well, yes."))


def test_cancel_with_the_samples_played_counts_on_from_there():
    speaker = Speaker(Letters())
    speaker.say("One two three four five.")
    played = 800 + 200 * len("One two")
    assert speaker.heard(played) == (0, len("One two"))
    speaker.cancel(played)
    after = speaker.say(" Well, yes.", index=7)
    assert speaker.heard(played + 1) == (0, len("One two"))
    assert speaker.heard(played + len(after)) == (7, len(" Well, yes."))


def test_text_without_words_is_silent_and_heard():
    speaker = Speaker(Letters())
    first = speaker.say("Fine. ")
    assert speaker.say("🙂 ... ").size == 0
    speaker.flush()
    assert speaker.heard(len(first)) == (1, len("🙂 ... "))


def test_memory_stays_bounded():
    speaker = Speaker(Letters())
    for _ in range(1500):
        speaker.say(" A bee.")
    assert len(speaker._words) <= 2048
    assert speaker.heard(10) is None


@given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=6), st.data())
def test_words_are_found_in_sounds_that_differ_a_little(texts: list[str], data: st.DataObject):
    """Times never decrease and stay in the sound; with equal sounds they are exact."""
    sounds = [(c, n) for n, word in enumerate(texts) for c in word]
    timed = [(c, 10 * i, 10 * i + 10) for i, (c, _) in enumerate(sounds)]
    spans = [(5 * n, 5 * n + len(word)) for n, word in enumerate(texts)]
    exact = place_words(spans, texts, timed)
    for n, word in enumerate(exact):
        mine = [t for t, (_, owner) in zip(timed, sounds, strict=True) if owner == n]
        assert (word.first, word.last) == (mine[0][1], mine[-1][2])
    changed = [t for t in timed if data.draw(st.integers(0, 4))]
    found = place_words(spans, texts, changed)
    times = [t for w in found for t in (w.first, w.last)]
    assert times == sorted(times)
    assert times[-1] <= 10 * len(timed)


def test_figures():
    assert word_errors("To-morrow, at nine!", "tomorrow at night") == (1, 3)
    pcm = np.concatenate([np.full(8000, 9000), np.zeros(1600), np.full(8000, 9000)]).astype(np.int16)
    assert gap_at(pcm, 8000, 16000, 9000) == pytest.approx(100)
    assert gap_at(pcm, 3000, 16000, 9000) == 0
    assert player_waits([(2.5, 0.5), (1.0, 0.5), (2.0, 0.5)]) == pytest.approx([0, 0.5])


def test_clear_errors(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="must be auto"):
        load_synthesizer("festival")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="apt install espeak-ng"):
        EspeakSynthesizer()
    try:
        import google.cloud.texttospeech  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install google-cloud-texttospeech"):
            GoogleSynthesizer()
