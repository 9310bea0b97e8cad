"""Learning rate schedules: warm-up, stable, decay (WSD), cosine, linear and constant."""

import jax.numpy as jnp
import optax

from duplex_jax.train.config import Optim


def learning_rate(optim: Optim) -> optax.Schedule:
    """The learning rate of each step, counting from 0.

    With W warm-up steps, N steps, D decay steps, s = N - D the end of the stable phase, f the final fraction, and
    u = (t - s) / D in [0, 1]:

        t < W        lr * (t + 1) / W
        t < s        lr
        else         lr * f ** u                                exponential: Hu et al. 2024, "MiniCPM", section 4.2
                     lr * (1 - (1 - f) * u)                     linear
                     lr * (f + (1 - f) * (1 + cos(pi u)) / 2)   cosine
                     lr * (1 - (1 - f) * sqrt(u))               1-sqrt: Haegele et al. 2024, arXiv 2405.18392

    MiniCPM writes the decay as 0.5 ** ((t - s) / T); here f = 0.5 ** (D / T), so that the config gives the final rate.
    `cosine` and `linear` decay in that form from the end of the warm-up to N (D = N - W); `constant` does not decay.
    """
    if optim.schedule == "wsd":
        start, form = optim.steps - optim.decay_steps, optim.decay
    else:
        start, form = min(optim.warmup, optim.steps), optim.schedule
    length = max(1, optim.steps - start)

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum((step + 1) / max(1, optim.warmup), 1.0)
        u = jnp.clip((step - start) / length, 0.0, 1.0)
        if form == "exponential":
            decay = jnp.power(jnp.float32(max(optim.final, 1e-8)), u)
        elif form == "linear":
            decay = 1 - (1 - optim.final) * u
        elif form == "cosine":
            decay = optim.final + (1 - optim.final) * (1 + jnp.cos(jnp.pi * u)) / 2
        elif form == "1-sqrt":
            decay = 1 - (1 - optim.final) * jnp.sqrt(u)
        else:
            decay = jnp.ones_like(u)
        return optim.lr * warm * decay

    return rate


def phase(optim: Optim, step: int) -> str:
    """The phase of a step: `warmup`, `stable` or `decay`."""
    if step < optim.warmup:
        return "warmup"
    stable = optim.schedule == "constant" or (optim.schedule == "wsd" and step <= optim.steps - optim.decay_steps)
    return "stable" if stable else "decay"
