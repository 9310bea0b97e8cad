"""WSD against its formula in plain Python, and against optax where optax has the form."""

import dataclasses
import math

import numpy as np
import optax
import pytest

from duplex_jax.train.config import Optim
from duplex_jax.train.schedule import learning_rate, phase

OPTIM = Optim(steps=200, lr=2e-3, warmup=20, decay_steps=50, final=0.05)


def formula(optim: Optim, t: int) -> float:
    if t < optim.warmup:
        return optim.lr * (t + 1) / optim.warmup
    s = optim.steps - optim.decay_steps
    if t < s:
        return optim.lr
    u, f = min(1.0, (t - s) / optim.decay_steps), optim.final
    forms = {
        "exponential": f**u, "linear": 1 - (1 - f) * u, "1-sqrt": 1 - (1 - f) * math.sqrt(u),
        "cosine": f + (1 - f) * (1 + math.cos(math.pi * u)) / 2,
    }  # fmt: skip
    return optim.lr * forms[optim.decay]


@pytest.mark.parametrize("decay", ["exponential", "linear", "cosine", "1-sqrt"])
def test_wsd_is_its_formula(decay: str):
    optim = dataclasses.replace(OPTIM, decay=decay)
    rate = learning_rate(optim)
    np.testing.assert_allclose([rate(t) for t in range(210)], [formula(optim, t) for t in range(210)], rtol=2e-6)


def test_minicpm_writes_the_same_exponential():
    """Hu et al. 2024: lr * 0.5 ** ((t - s) / T), with T such that the decay ends at `final`."""
    T = OPTIM.decay_steps * math.log(0.5) / math.log(OPTIM.final)
    rate = learning_rate(dataclasses.replace(OPTIM, decay="exponential"))
    for t in range(150, 201):
        assert float(rate(t)) == pytest.approx(OPTIM.lr * 0.5 ** ((t - 150) / T), rel=1e-5)


@pytest.mark.parametrize("form", ["linear", "cosine", "exponential"])
def test_against_optax(form: str):
    """optax's pieces joined; its warm-up starts at 0, ours at lr / W, so it is asked one step later."""
    o = dataclasses.replace(OPTIM, decay=form)
    tail = {
        "linear": optax.linear_schedule(o.lr, o.lr * o.final, o.decay_steps),
        "cosine": optax.cosine_decay_schedule(o.lr, o.decay_steps, alpha=o.final),
        "exponential": optax.exponential_decay(o.lr, o.decay_steps, o.final, end_value=o.lr * o.final),
    }[form]
    warm = optax.linear_schedule(0.0, o.lr, o.warmup)
    stable, rate = o.steps - o.decay_steps, learning_rate(o)
    for t in range(o.steps + 1):
        wanted = warm(t + 1) if t < o.warmup else o.lr if t < stable else tail(t - stable)
        assert float(rate(t)) == pytest.approx(float(wanted), rel=1e-5)


def test_cosine_from_the_warm_up_on():
    o = dataclasses.replace(OPTIM, schedule="cosine")
    wanted = optax.cosine_decay_schedule(o.lr, o.steps - o.warmup, alpha=o.final)
    rate = learning_rate(o)
    for t in range(o.warmup, o.steps):
        assert float(rate(t)) == pytest.approx(float(wanted(t - o.warmup)), rel=1e-5)


def test_constant():
    rate = learning_rate(dataclasses.replace(OPTIM, schedule="constant"))
    assert {round(float(rate(t)), 9) for t in range(20, 300)} == {OPTIM.lr}


def test_a_branch_decays_as_the_run_itself_would():
    """A decay that leaves step 150 of a longer run sees the learning rates of a run that was meant to end there."""
    long = dataclasses.replace(OPTIM, steps=1000)
    branch = dataclasses.replace(long, steps=150 + long.decay_steps)
    whole, cut = learning_rate(long), learning_rate(branch)
    assert [float(whole(t)) for t in range(150)] == [float(cut(t)) for t in range(150)]
    assert [float(cut(t)) for t in range(150, 200)] == [float(learning_rate(OPTIM)(t)) for t in range(150, 200)]


@pytest.mark.parametrize(("step", "name"), [(0, "warmup"), (20, "stable"), (150, "stable"), (151, "decay")])
def test_phases(step: int, name: str):
    assert phase(OPTIM, step) == name
