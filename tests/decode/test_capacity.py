"""What an accelerator can serve on paper: the bytes of the caches are those of an engine."""

import jax
import pytest

from duplex_jax.decode.capacity import cache_bytes, plan_sessions
from duplex_jax.decode.engine import Engine
from duplex_jax.parallel import Chip
from tests.tiny import CONFIG, tiny_model


@pytest.mark.parametrize(("rows", "entries"), [(1, "bfloat16"), (17, "int8")])
def test_caches_take_what_the_formula_says(rows: int, entries: str):
    model = tiny_model()
    engine = Engine(
        model.model, model.template, rows=rows, capacity=201, entries=entries, kernels=False
    )  # fmt: skip
    engine.begin_shadow(engine.open([65]), 0, 0)
    held = sum(x.nbytes for x in jax.tree.leaves((engine.cache, engine._shadow_cache)))
    assert held == cache_bytes(model.config, rows, 201, entries)


def test_sessions_fit_to_the_last_byte():
    """By memory as many sessions as room is for, none where not even one fits."""
    weights = 2 * CONFIG.num_params

    def sessions(room: float) -> list[int]:
        chip = Chip("small", memory=(weights + room) / 0.85, bandwidth=1e15, flops=1e18, link=1.0, network=1.0)
        return [plan.sessions for plan in plan_sessions(CONFIG, chip, [512])]

    for rows in (1, 7, 8, 9, 16):
        room = cache_bytes(CONFIG, rows, 512, "int8")
        assert sessions(room + 1)[1] == rows
        assert sessions(room - 1)[1] == rows - 1
    assert sessions(cache_bytes(CONFIG, 1, 512, "int8") - 1) == [0, 0]
