"""What a client chooses for its session."""

import dataclasses
from typing import Literal

from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.timeline import whole_characters


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a client chooses for its session.

    Attributes:
        mode: duplex, or the turn-based baseline, which answers when the user has paused for a slice.
        clock: server: a slice every `slice_seconds`, of the words that came in; client: a slice for each one sent.
        slice_seconds: k.
        sampling: how tokens are drawn.
        seed: of the draws.
        system: a system prompt.
        dormant: never speak unasked.
        max_tokens: of a turn-based answer.
        keep_idle: see `DuplexSession`.
    """

    mode: Literal["duplex", "turn_based"] = "duplex"
    clock: Literal["server", "client"] = "server"
    slice_seconds: float = 2.0
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    system: str | None = None
    dormant: bool = False
    max_tokens: int = 256
    keep_idle: int | None = 1

    def __post_init__(self):
        if not 0.1 <= self.slice_seconds <= 60:
            raise UserError(f"slice_seconds {self.slice_seconds} is not in 0.1 to 60; the paper's is 2")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed {self.seed} is not in 0 to {2**32 - 1}")
        if self.system is not None and not whole_characters(self.system):
            raise UserError("system holds half of a surrogate pair; send whole characters")
