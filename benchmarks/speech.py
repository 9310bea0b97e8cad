"""`duplex-jax bench speech`: silence at the joins of spoken slices, and word errors of recognition."""

import os
import platform
import re
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from duplex_jax.errors import UserError
from duplex_jax.serve.voice.asr import Listener, MoonshineRecognizer, edits, plain_word
from duplex_jax.serve.voice.audio import SAMPLE_RATE, resample
from duplex_jax.serve.voice.speech import Speaker, silent_frames
from duplex_jax.serve.voice.tts import PiperSynthesizer, Synthesizer, load_synthesizer
from duplex_jax.slicing import slice_tokens
from duplex_jax.tokenizer import resolve_tokenizer

SLICE_SECONDS = 2

SENTENCES = (
    "What is the capital of France, and why is it famous around the world?",
    "Can you tell me what the weather will be like tomorrow morning?",
    "Please remind me to call my sister before she leaves for the airport.",
    "I would like to book a table for four people on Friday evening.",
    "How long does it take to boil an egg so that the middle is still soft?",
    "Wait, stop, that is not what I wanted to know.",
    "My uncle has two dogs and a very old cat that sleeps all day.",
    "Could you explain how a bicycle stays upright when it is moving?",
    "The train was late again, so we missed the beginning of the film.",
    "Which vegetables can I plant in the garden at the end of summer?",
    "Let us talk about something else, for example the music that you like.",
    "She bought a small house near the river and painted the door green.",
    "Is there a pharmacy near here that is open on Sundays?",
    "I have been learning Spanish for a year, but I still make many mistakes.",
    "Turn off the lights in the kitchen and close the window, please.",
    "What should I do if my phone falls into the water?",
    "We walked along the beach until the sun went down behind the hills.",
    "Give me a simple recipe for tomato soup without cream.",
    "He asked the teacher a question that nobody in the class could answer.",
    "Thank you, that was very helpful, and now I need a short break.",
)

ANSWERS = (
    "Paris is the capital of France. It is famous for the Eiffel Tower, its museums and its food. Millions of people "
    "visit it every year, and many of them come back because they could not see everything the first time.",
    "A bicycle stays upright because the rider keeps steering it back under its own weight. When it begins to lean to "
    "the left, the front wheel turns a little to the left as well, and the bicycle rolls back under the rider.",
    "To make tomato soup, warm some oil in a large pot and cook an onion until it is soft. Then add the tomatoes and "
    "a cup of water, and let everything simmer for a good while before you blend it.",
    "Most people need a long and quiet night of sleep to feel well. If you often wake up tired, try to go to bed "
    "at the same time every day and leave your phone in another room.",
    "The moon looks larger near the horizon because the brain compares it with trees and houses. A photograph shows "
    "that its size does not really change while it climbs higher into the sky.",
)


def word_errors(reference: str, heard: str) -> tuple[int, int]:
    """Edits (substitutions, insertions, deletions) from one text to another, and the number of words in the first.

    Case, punctuation and hyphens are ignored. Their ratio is the word error rate.
    """
    one, other = ([w for w in map(plain_word, text.split()) if w] for text in (reference, heard))
    return edits(one, other)[-1][-1], len(one)


def gap_at(pcm: np.ndarray, at: int, rate: int, loud: float) -> float:
    """Milliseconds of silence around a sample: the longest silent run within 60 ms of it.

    Args:
        pcm: int16 `[n]`.
        at: index of the sample.
        rate: samples per second.
        loud: RMS level of speech; 40 dB below it is silence.
    """
    silent = silent_frames(pcm, rate, loud)
    size = int(0.005 * rate)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], silent.astype(np.int8), [0]])))
    near = [
        (b - a) * size / rate * 1000
        for a, b in edges.reshape(-1, 2)
        if a * size <= at + 0.06 * rate and b * size >= at - 0.06 * rate
    ]
    return max(near, default=0.0)


def speech_level(pcm: np.ndarray, rate: int) -> float:
    """RMS level of speech: the 95th percentile over 5 ms frames."""
    size = int(0.005 * rate)
    frames = pcm[: len(pcm) // size * size].reshape(-1, size).astype(np.float32)
    return float(np.percentile(np.sqrt(np.square(frames).mean(1)), 95)) if len(frames) else 0.0


def bench_speech(
    voice: str = "piper",
    tokenizer: str = "smollm2-135m-duplex",
    sentences: int = len(SENTENCES),
    answers: int = len(ANSWERS),
    confirm: bool = True,
    noise_scale: float = 0.0,
    noise_w: float = 0.0,
) -> dict[str, Any]:
    """Word errors of recognition in slices, and silence where slices are joined.

    The voice speaks the sentences and Moonshine recognises them: in slices of 2 s through `Listener`, each beginning at
    a different point in its slice, and as a whole. The answers are cut every ten tokens and spoken slice by slice
    (naive), through `Speaker`, and as one text (whole); the gap at a join is the silence around it.

    Args:
        voice: as `load_synthesizer` takes it.
        tokenizer: cuts the answers.
        sentences: number of sentences for recognition; 0 skips it.
        answers: number of answers for the joins; 0 skips them.
        confirm: whether `Listener` confirms its results.
        noise_scale: Piper's randomness of the sound.
        noise_w: Piper's randomness of the durations.

    Returns:
        `recognition`, `joins` and the machine.

    Raises:
        UserError: an argument is invalid, or a package is missing.
    """
    if not 0 <= sentences <= len(SENTENCES) or not 0 <= answers <= len(ANSWERS):
        raise UserError(f"sentences={sentences} answers={answers}: there are {len(SENTENCES)} and {len(ANSWERS)}")
    if voice == "piper":
        synthesizer: Synthesizer = PiperSynthesizer(noise_scale=noise_scale, noise_w=noise_w)
    else:
        synthesizer = load_synthesizer(voice)
    result: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "voice": voice,
    }
    if sentences:
        result["recognition"] = measure_recognition(synthesizer, SENTENCES[:sentences], confirm)
    if answers:
        cutter = resolve_tokenizer(tokenizer)
        result["joins"] = measure_joins(synthesizer, [slice_tokens(text, cutter) for text in ANSWERS[:answers]])
    return result


def measure_recognition(synthesizer: Synthesizer, sentences: Sequence[str], confirm: bool = True) -> dict[str, Any]:
    """Word error rates of `Listener` and of the recogniser alone, and seconds of CPU time."""
    recognizer = MoonshineRecognizer()
    errors: dict[str, list[int]] = {"streaming": [0, 0], "at_once": [0, 0]}
    texts, ticks, seconds = [], [], 0.0
    for i, sentence in enumerate(sentences):
        pcm = resample(synthesizer.synthesize(sentence).pcm, synthesizer.sample_rate, SAMPLE_RATE)
        seconds += len(pcm) / SAMPLE_RATE
        at_once = recognizer.transcribe(pcm)
        # Every sentence starts at a different point of the slice clock.
        before = np.zeros(int((0.3 + 0.37 * i % SLICE_SECONDS) * SAMPLE_RATE), np.float32)
        stream = np.concatenate([before, pcm, np.zeros(2 * SLICE_SECONDS * SAMPLE_RATE, np.float32)])
        listener = Listener(recognizer, confirm=confirm)
        taken = []
        for first in range(0, len(stream), SLICE_SECONDS * SAMPLE_RATE):
            listener.feed(stream[first : first + SLICE_SECONDS * SAMPLE_RATE])
            began = time.process_time()
            taken.append(listener.take())
            ticks.append(time.process_time() - began)
        streaming = " ".join(t for t in taken if t)
        for name, text in (("streaming", streaming), ("at_once", at_once)):
            wrong, words = word_errors(sentence, text)
            errors[name][0] += wrong
            errors[name][1] += words
        texts.append({"said": sentence, "slices": taken, "at_once": at_once})
    busy = [t for t in ticks if t > 0.02]
    return {
        "sentences": len(sentences),
        "seconds": round(seconds, 1),
        "words": errors["streaming"][1],
        "wer": {name: wrong / words for name, (wrong, words) in errors.items()},
        "tick_cpu_seconds": {
            "median": statistics.median(busy) if busy else 0.0,
            "most": max(ticks),
            "per_second_of_speech": sum(ticks) / seconds,
        },
        "texts": texts,
    }


def measure_joins(synthesizer: Synthesizer, answers: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Silence at joins in milliseconds, within clauses and at punctuation, for each way of speaking the same slices."""
    rate = synthesizer.sample_rate
    gaps: dict[str, dict[str, list[float]]] = {
        name: {"within": [], "punctuation": []} for name in ("naive", "speaker", "whole")
    }
    seconds = dict.fromkeys(gaps, 0.0)
    waits: dict[str, list[float]] = {"naive": [], "speaker": []}
    errors = {name: [0, 0] for name in gaps}
    recognizer = MoonshineRecognizer()

    def check(name: str, text: str, pcm: np.ndarray) -> None:
        """Counts words that a join lost or doubled, by recognising the speech."""
        seconds[name] += len(pcm) / rate
        wrong, words = word_errors(text, recognizer.transcribe(resample(pcm, rate, SAMPLE_RATE)))
        errors[name][0] += wrong
        errors[name][1] += words

    cpu: list[float] = []
    for slices in answers:
        text = "".join(slices)
        whole = synthesizer.synthesize(text)
        loud = speech_level(whole.pcm, rate)
        check("whole", text, whole.pcm)
        speaker = Speaker(synthesizer)
        pieces: dict[str, list[tuple[int, np.ndarray, float]]] = {"naive": [], "speaker": []}
        end = 0
        for i, piece in enumerate(slices):
            end += len(piece)
            began = time.process_time()
            pieces["naive"].append((end, synthesizer.synthesize(piece).pcm, time.process_time() - began))
            began = time.process_time()
            pcm = speaker.say(piece, last=i == len(slices) - 1)
            cpu.append(time.process_time() - began)
            pieces["speaker"].append((end - speaker.held, pcm, cpu[-1]))
        for name, parts in pieces.items():
            pcm = np.concatenate([p for _, p, _ in parts])
            check(name, text, pcm)
            waits[name] += player_waits([(len(p) / rate, took) for _, p, took in parts])
            at = 0
            for end, part, _ in parts[:-1]:
                at += len(part)
                if not len(part):
                    continue
                kind = "punctuation" if re.search(r"[^\w\s'-]\s*$", text[:end]) else "within"
                gaps[name][kind].append(gap_at(pcm, at, rate, loud))
                if name == "speaker" and whole.words is not None:
                    after = min((w.first for w in whole.words if w.start >= end), default=len(whole.pcm))
                    gaps["whole"][kind].append(gap_at(whole.pcm, after, rate, loud))
    return {
        "slices": sum(map(len, answers)),
        "gap_ms": {name: {kind: _spread(found) for kind, found in kinds.items()} for name, kinds in gaps.items()},
        "player_wait_ms": {name: _spread([1000 * w for w in found]) for name, found in waits.items()},
        "wer": {name: wrong / words for name, (wrong, words) in errors.items()},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "speaker_cpu_seconds": {
            "median": statistics.median(cpu), "most": max(cpu), "per_second_of_speech": sum(cpu) / seconds["speaker"],
        },
    }  # fmt: skip


def player_waits(pieces: Sequence[tuple[float, float]], clock: float = SLICE_SECONDS) -> list[float]:
    """Seconds without sound before each further piece, for a player that starts with the first one.

    Args:
        pieces: (duration, time of synthesis) of each piece in seconds.
        clock: seconds per slice.
    """
    waits, end = [], 0.0
    for i, (sounds, took) in enumerate(pieces):
        comes = i * clock + took
        waits.append(max(0.0, comes - end) if i else 0.0)
        end = max(end, comes) + sounds
    return waits[1:]


def _spread(found: Sequence[float]) -> dict[str, Any]:
    if not found:
        return {"joins": 0}
    return {"joins": len(found), "mean": statistics.mean(found), "median": statistics.median(found), "most": max(found)}


def _figures(spread: dict[str, Any]) -> str:
    return "".join(f"{spread[k]:>8.0f}" for k in ("mean", "median", "most")) if spread["joins"] else ""


def table(result: dict[str, Any]) -> list[str]:
    """Formats the report as lines of text."""
    lines = []
    if "recognition" in result:
        r = result["recognition"]
        lines.append(f"recognition: {r['sentences']} sentences, {r['words']} words, {r['seconds']} s of speech")
        lines.append(f"  {'word error rate in slices of 2 s':40}{r['wer']['streaming']:>8.1%}")
        lines.append(f"  {'word error rate at once':40}{r['wer']['at_once']:>8.1%}")
        for key, value in r["tick_cpu_seconds"].items():
            lines.append(f"  {'CPU seconds, ' + key.replace('_', ' '):40}{value:>8.2f}")
    if "joins" in result:
        j = result["joins"]
        lines.append(f"joins of {j['slices']} slices, ms of silence {'joins':>8}{'mean':>8}{'median':>8}{'most':>8}")
        for kind, label in (("within", "within a clause"), ("punctuation", "at punctuation")):
            for name, kinds in j["gap_ms"].items():
                g = kinds[kind]
                lines.append(f"  {label:18}{name:16}{g['joins']:>8}{_figures(g)}")
        lines.append(
            "  word error rate at once: " + ", ".join(f"{name} {value:.1%}" for name, value in j["wer"].items())
        )
        for name, g in j["player_wait_ms"].items():
            lines.append(f"  {'player without':18}{name:16}{g['joins']:>8}{_figures(g)}")
        lines.append("  seconds of sound: " + ", ".join(f"{name} {value}" for name, value in j["seconds"].items()))
        for key, value in j["speaker_cpu_seconds"].items():
            lines.append(f"  {'CPU seconds of a slice, ' + key.replace('_', ' '):40}{value:>8.2f}")
    return lines
