"""The kinds of events that label the interesting moments of generated timelines, for scoring.

Each event belongs to one pair. `barge_in` and `yield` share theirs: the assistant hears the user's first words and is
silent in the slice of the same pair.
"""

from duplex_jax.timeline import (
    BACKCHANNEL,
    BARGE_IN,
    BE_QUIET,
    HESITATION,
    OPENING,
    QUERY_END,
    RESUME,
    SILENCE,
    YIELD,
)

KINDS = {
    QUERY_END: "carries the last words of something that the user wants answered",
    BARGE_IN: "the user starts to speak while the assistant's message is unfinished",
    YIELD: "the assistant falls silent because of a barge-in",
    RESUME: "the assistant takes up the message that was interrupted",
    BE_QUIET: "carries the last words of a demand for silence: idle is right until the next query ends",
    BACKCHANNEL: "the user says 'mm-hm' or the like and the assistant goes on",
    HESITATION: "the first silent pair inside a query that is not over",
    SILENCE: "the first pair of a long stretch in which nobody speaks",
    OPENING: "the assistant speaks first, after a silence",
}
