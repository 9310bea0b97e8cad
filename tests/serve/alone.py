"""What a session gives that has an engine for itself: what a server's sessions are compared with.

XLA's products of one row and of many differ in their last bits: logits of the tiny model by up to 2e-5. That tips a
draw where two tokens tie at the edge of the nucleus, or where the random number meets the boundary of two tokens:
about six slices in 100,000 with this model, whose nucleus holds 70 tokens.
"""

import functools
import random
from collections.abc import Sequence

import jax
import numpy as np

from duplex_jax.decode.rows import never_sampled
from duplex_jax.decode.sampling import Sampling
from duplex_jax.decode.session import DuplexSession
from tests.serve.serving import engine_of
from tests.tiny import FreshForward, tiny_model

WORDS = ("hello there", "what is", "the capital of", "no wait", "stop it now", "and then")
ROUNDING = 3e-5


def script(seed: int, n: int = 12) -> list[str | None]:
    """What a user says, slice by slice."""
    rng = random.Random(seed)
    return [rng.choice(WORDS) if rng.random() < 0.6 else None for _ in range(n)]


def alone(
    user: Sequence[str | None], seed: int = 0, sampling: Sampling | None = None,
    got: Sequence[str | None] | None = None,
) -> list[str | None]:  # fmt: skip
    """What a session of its own answers.

    Args:
        user: its slices.
        seed: of its draws.
        sampling: how it draws; greedy by default.
        got: another session's answers. Where one of them differs by nothing but draws that `ROUNDING` decides, this
            session goes on with that one.
    """
    session = DuplexSession(engine_of(tiny_model(), 1), seed=seed, sampling=sampling or Sampling(temperature=0))
    answers = []
    try:
        for i, text in enumerate(user):
            answer = session.step(text).text
            if got is not None and i < len(got) and answer != got[i] and _take_instead(session, text, got[i]):
                answer = got[i]
            answers.append(answer)
        return answers
    finally:
        session.close()


def _take_instead(session: DuplexSession, user: str | None, answer: str | None) -> bool:
    """Replaces the newest slice by `answer`, if rounding could have made it; whether it did."""
    step = session._row.steps - 1
    session.rewind(len(session.timeline) - 1)
    part = session._user_part(user)
    ids = _within_rounding(session, [*session.ids, *part], step, [], answer)
    if ids is None:
        return False
    session.engine.append(session._row, [*part, *ids])
    assert session._record_step(user, part, ids) == answer
    return True


@functools.cache
def _fresh() -> FreshForward:
    return FreshForward(tiny_model())


def _within_rounding(
    session: DuplexSession, context: list[int], step: int, said: list[int], answer: str | None
) -> list[int] | None:
    """Ids behind `said` that make `answer`, each drawn from the context's logits give or take `ROUNDING`."""
    template, row = session.template, session._row
    if said and (said[-1] in template.stop_ids or len(said) == session.engine.max_slice_tokens):
        return said if (session._text(session._carry, session._words(said))[0] or None) == answer else None
    model = tiny_model()
    logits = np.where(never_sampled(model.config, template), -np.inf, _fresh()(context + said)).astype(np.float64)
    if said:
        logits[template.idle_id] = -np.inf
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(np.uint32(row.seed)), np.uint32(step)), len(said))
    at = float(jax.random.uniform(key))
    noise = np.random.default_rng(0).uniform(-ROUNDING, ROUNDING, (256, len(logits)))
    for token in dict.fromkeys(_draw(logits + n, at, row.sampling) for n in noise):
        found = _within_rounding(session, context, step, [*said, token], answer)
        if found is not None:
            return found
    return None


def _draw(logits: np.ndarray, at: float, sampling: Sampling) -> int:
    """The token at a share of the nucleus' mass, by sorting."""
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    order = np.argsort(-weights)
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= sampling.top_p * weights.sum()]] = 0
    sums = np.cumsum(weights)
    return int(np.argmax(sums > at * sums[-1]))
