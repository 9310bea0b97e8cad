"""The transition sentences of the paper's appendix A, and the prompt that fuses one with what the user says next."""

FUSE_PROMPT = (
    "Fuse the two sentences smoothly and replace [topic] with the topic of sentence two.\n"
    'Sentence one "{sentence_a}"\n'
    'Sentence two "{sentence_b}"\n'
    "Give me your answer only, no other words. Give me your answer only, no other words."
)

# A.1. The empty one: the user says the next thing straight away.
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

# Those of A.1 that ask for silence; a question in the same breath would contradict them.
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

# A.3. The empty one is not rewritten: the user starts the new dialogue as fast as possible.
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
