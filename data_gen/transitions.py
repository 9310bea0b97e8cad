"""Transition sentences with which users interrupt: those of the paper's appendix A, and shorter spoken ones of our own.

Also contains the paper's prompt, which fuses such a sentence with the user's next words.
"""

import dataclasses
import random
from collections.abc import Sequence
from typing import ClassVar

FUSE_PROMPT = (
    "Fuse the two sentences smoothly and replace [topic] with the topic of sentence two.\n"
    'Sentence one "{sentence_a}"\n'
    'Sentence two "{sentence_b}"\n'
    "Give me your answer only, no other words. Give me your answer only, no other words."
)

# A.1. With the empty sentence the user's next words follow at once.
TERMINATION = (
    "",
    "I need to cut you off right now; this is urgent.",
    "Excuse me, I need to interject for a moment.",
    "Sorry to interrupt, but I have something important to add.",
    "Excuse me, may I interrupt for a moment?",
    "I'm sorry to break in, but there's something important I need to address.",
    "I apologize for interrupting, but I'd like to interject for a moment.",
    "I'm sorry to interrupt, but I have a quick point to make.",
    "I appreciate your input, but I need a moment of silence now.",
    "I'm sorry to interrupt, but I really need some quiet time to focus.",
    "Enough talking! I need you to be quiet now.",
)

# Those of A.1 that ask for silence; a question right after them would contradict them.
SILENCE = TERMINATION[8:]

# A.2
REGENERATION = (
    "I may not have expressed myself clearly. What I meant was [topic]",
    "I think there might be a bit of confusion. Let me clarify [topic]",
    "I appreciate your input, but I was hoping for more details on [topic]",
    "I think there might be a misunderstanding. What I'm really looking for is [topic]",
    "I may not have explained myself clearly. Let me rephrase the question. What are your thoughts on [topic]?",
    "Actually, the correct information is [topic]. Could you share your perspective on that?",
    "I'm a bit confused because what you mentioned contradicts the information I have. Can we go over this again?",
    "I'm sorry, but that information seems to be incorrect. Let me clarify the question, and please provide the "
    "accurate details regarding [topic].",
    "I'm sorry, but that's not accurate. The correct information is [topic]. It's essential to have the correct "
    "details for our discussion.",
    "I appreciate your effort in responding, but I think there might be a misunderstanding. What I intended to convey "
    "was [topic]. Let's revisit the topic to ensure we're on the same page.",
    "I see there might be some confusion. Let me clarify my point further to ensure we're on the same page. What I "
    "meant was [topic]. Can we discuss this to make sure we have a mutual understanding?",
    "There seems to be a misunderstanding. I meant [topic]. Let's align our understanding.",
    "No.",
    "Oh, No.",
    "No, you are wrong.",
)

# A.3. The empty sentence is not rewritten: the user starts the new dialogue at once.
RESET = (
    "",
    "That's interesting, and speaking of [topic], have you ever...?",
    "I was just thinking about [topic], what are your thoughts on that?",
    "That's fascinating! On a different note, have you ever thought about [topic]?",
    "I was just reading about [topic]. What are your thoughts on that?",
    "By the way, speaking of something else.",
    "That reminds me, have you heard about [topic]?",
    "Can we shift gears for a moment and talk about [topic]?",
    "I've been curious about [topic]. Have you ever considered it?",
    "I was thinking about [topic]. What are your thoughts on that?",
    "Now, shifting gears to a different subject, have you ever explored [topic]?",
    "Moving on to a different topic, have you ever considered [topic]?",
    "Changing the subject, have you ever thought about [topic]?",
    "Switching gears, let's talk about [topic].",
    "On a different note, have you ever thought about [topic]?",
    "Speaking of which, have you ever considered exploring [topic]?",
    "Changing the subject, let's now delve into [topic].",
    "Shifting gears a bit, let's talk about [topic].",
)

# Our own, as spoken. A question follows a termination in the same breath.
SPOKEN_TERMINATION = (
    "Stop please.", "Wait, wait.", "Hold on.", "OK, stop there.", "Never mind that.", "Actually, no.",
    "Wait a second.", "Sorry, hold on.", "Stop, stop.", "One moment.", "Okay, okay, got it.",
    "That's enough about that.", "Let me stop you there.", "Hang on a second.", "Just a moment, please.", "Skip that.",
    "Sorry, different question.", "Okay, next question.", "Actually, wait.", "Hey, stop for a second.",
    "Right, I know that already.", "Oh, before I forget.", "Can I just ask something?", "Forget that.",
    "Hmm, no, wait.", "Okay, I get it.", "No, stop.", "Excuse me.", "Wait.", "Stop.", "Uh, sorry, one thing.",
    "Enough, I have another question.", "Can I interrupt you?", "Never mind.", "All right, all right.",
    "Stop, I want to ask something else.", "Sorry to cut you off.", "Hey, wait a minute.",
)  # fmt: skip

# Demands for silence are used without a question here, too.
SPOKEN_SILENCE = (
    "Be quiet please.", "Shh, quiet now.", "Please stop talking.", "That's enough, thank you.",
    "Okay, stop talking now.", "Quiet, please.", "Shush.", "Stop talking for a bit.", "Give me a minute of quiet.",
    "Can you be quiet for a moment?", "Not now, please be quiet.", "Hush for a moment.", "I need some silence.",
    "No more talking, please.", "Pause, please.", "Please be silent for now.",
    "Sorry, my phone is ringing, be quiet.", "Quiet, someone's at the door.", "Let me think for a moment.",
    "Thanks, you can stop now.", "Stop it, be quiet.", "Okay, that's enough for now.",
)  # fmt: skip

SPOKEN_REGENERATION = (
    "No, that's not what I meant.", "That's not what I asked.", "No, no.", "That's wrong.", "That can't be right.",
    "You misunderstood me.", "Wait, that's not right.", "Not quite.", "No, listen.", "Try again, please.",
    "I asked about [topic].", "No, I meant [topic].", "Hmm, are you sure?", "That doesn't help me.",
    "Let me ask again.", "Once more, please.", "Start over, please.", "That's too complicated.", "Simpler, please.",
    "You didn't answer my question.", "I didn't get that.", "Huh?", "Wait, what?", "Say it in other words, please.",
    "Sorry, I don't follow.", "No, that's something else.",
)  # fmt: skip

SPOKEN_RESET = (
    "Let's talk about something else.", "New topic.", "Anyway.", "Something different now.",
    "Okay, change of subject.", "Enough of that.", "By the way.", "Oh, that reminds me.", "Let's move on.",
    "Different question.", "Now for something else.", "Moving on.", "Okay, what about [topic]?",
    "Let's talk about [topic].", "Can we talk about [topic]?", "I'd rather talk about [topic].",
    "Quick change of topic.", "Oh, I just thought of something.", "Let's leave it there.",
    "I have another question.", "On to the next thing.", "That's boring, let's talk about [topic].",
    "Never mind, something else.",
)  # fmt: skip

# The paper's sentences that do not fit an ordinary question: they claim that something is urgent or important, or ask
# a question of their own. Only the paper's data uses them.
ANNOUNCING = frozenset((*TERMINATION[1:4], TERMINATION[5], *(s for s in RESET if s.endswith("?"))))

# All sentences that ask for silence.
QUIET = frozenset(SILENCE + SPOKEN_SILENCE)


@dataclasses.dataclass(frozen=True)
class Transitions:
    """The sentences that users interrupt with.

    Attributes:
        name: "paper", "spoken" (our own), or "both", about half each.
    """

    name: str = "paper"
    NAMES: ClassVar[tuple[str, ...]] = ("paper", "spoken", "both")

    def termination(self, rng: random.Random) -> str:
        """A sentence that stops the assistant, for a question or for silence (the latter are in `QUIET`)."""
        return self._pick(TERMINATION, SPOKEN_TERMINATION + SPOKEN_SILENCE, rng)

    def silence(self, rng: random.Random) -> str:
        """A sentence that asks for silence."""
        return self._pick(SILENCE, SPOKEN_SILENCE, rng)

    def regeneration(self, rng: random.Random, announce: bool = True) -> str:
        """A sentence that asks for another answer; without `announce`, one without a placeholder for a topic."""
        return self._pick(REGENERATION, SPOKEN_REGENERATION, rng, announce)

    def reset(self, rng: random.Random, announce: bool = True) -> str:
        """A sentence that drops a subject; without `announce`, one without a placeholder for a topic."""
        return self._pick(RESET, SPOKEN_RESET, rng, announce)

    def _pick(self, paper: Sequence[str], spoken: Sequence[str], rng: random.Random, announce: bool = True) -> str:
        if not announce:
            paper, spoken = ([s for s in sentences if "[topic]" not in s] for sentences in (paper, spoken))
        if self.name == "both":
            return rng.choice(rng.choice(([s for s in paper if s not in ANNOUNCING], spoken)))
        return rng.choice(paper if self.name == "paper" else spoken)


def number(sentence: str, kind: str) -> int:
    """A sentence's number among those of its kind, from 1: the paper's in its order, then ours.

    Args:
        sentence: the sentence with its brackets.
        kind: termination, regeneration or reset.
    """
    return _NUMBERS[kind].index(sentence) + 1


_NUMBERS = {
    "termination": TERMINATION + SPOKEN_TERMINATION + SPOKEN_SILENCE,
    "regeneration": REGENERATION + SPOKEN_REGENERATION,
    "reset": RESET + SPOKEN_RESET,
}
