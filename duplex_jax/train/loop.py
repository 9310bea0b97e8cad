"""A run from its first step to its last: read from top to bottom, this is what `duplex-jax train` does."""

import contextlib
import dataclasses
import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from duplex_jax import parallel
from duplex_jax.checkpoint.registry import load_model
from duplex_jax.checkpoint.resolve import load_template
from duplex_jax.data import dataset, loader
from duplex_jax.errors import UserError
from duplex_jax.files import atomic_write, check_space
from duplex_jax.model.config import ModelConfig
from duplex_jax.model.minicpm import MiniCPM
from duplex_jax.template import Template
from duplex_jax.tokenizer import fingerprint
from duplex_jax.train import checkpoints, flops
from duplex_jax.train import step as steps
from duplex_jax.train.checkpoints import Record, Store
from duplex_jax.train.config import Config, check, fit_batch, to_dict, to_lines
from duplex_jax.train.export import EXPORT, control_ids, export
from duplex_jax.train.metrics import Metrics, memory_gib
from duplex_jax.train.schedule import phase

EXIT_AGAIN = 75
"""The run was told to stop (SIGTERM), has saved, and goes on when started again: EX_TEMPFAIL of sysexits.h."""

EXIT_TROUBLE = 3
"""The loss or a gradient was not finite, or a spike, and the config says to stop."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """A window of steps to trace: `first` to `last`, into `WORKDIR/profile`."""

    first: int
    last: int


class Tracing(contextlib.AbstractContextManager):
    """Traces what a run does of a window of steps, also where it goes on or ends amid them."""

    def __init__(self, profile: Profile | None, folder: Path):
        self._profile, self._folder = profile, folder
        self._since: int | None = None

    def before(self, done: int) -> None:
        """Starts the trace once `done` steps have brought the run into the window."""
        window = self._profile
        if window is not None and self._since is None and window.first <= done < window.last:
            jax.profiler.start_trace(str(self._folder))
            self._since = done

    def after(self, done: int) -> None:
        """Ends the trace behind the window's last step."""
        if self._since is not None and self._profile is not None and done >= self._profile.last:
            jax.profiler.stop_trace()
            say(f"trace of steps {self._since} to {done} in {self._folder}")
            self._since = None

    def __exit__(self, *_: Any) -> None:
        if self._since is not None:
            jax.profiler.stop_trace()


def train(config: Config, spec: parallel.MeshSpec, workdir: Path, profile: Profile | None = None) -> int:
    """Trains, from the newest whole checkpoint in `workdir` where there is one.

    Args:
        config: the run.
        spec: the mesh; its devices must be there.
        workdir: checkpoints, metrics and the exported model go there.
        profile: steps to trace.

    Returns:
        0 when the last step is done, `EXIT_AGAIN` after SIGTERM, `EXIT_TROUBLE` at a bad step.

    Raises:
        UserError: whatever does not fit together, before time is spent.
    """
    config, branch = resolve_branch(fit_batch(check(config), spec))
    if not config.data.train:
        raise UserError("config.data.train: names no data; --config.data.train=DIR (packed, or a folder of timelines)")
    mesh = parallel.make_mesh(spec)

    # What is cheap to look at comes first: tokenizer and data, then shapes, and the weights last.
    template = load_template(config.model.tokenizer or config.model.source, config.model.template)
    sources = [dataset.open_rows(path, template, config.data.length) for path in config.data.train]
    held_out = [dataset.open_rows(path, template, config.data.length) for path in config.data.eval]
    start, model = load_start(config, template)
    say("\n".join(to_lines(config)))  # behind what may be refused, which is then the only line
    parallel.check_model(spec, model)
    plan = steps.Plan(config, model, mesh, spec, control_ids(template, config), template.idle_id)
    abstract = steps.abstract_state(plan)
    checkpoints.check_shared(workdir)
    store = Store(workdir, config.checkpoint.keep, config.checkpoint.keep_every)
    check_space(workdir, 2 * checkpoints.needed_bytes(abstract))

    state, frozen = steps.init_state(plan, start)
    del start
    restored = store.restore(abstract)
    if restored is None and branch is not None:
        restored = checkpoints.load_state(branch, abstract)
        say(f"decay starts from {branch}")
    position = 0
    if restored is not None:
        state, record = restored
        position = record.position
        warn_of_changes(record, config, spec)
        say(f"goes on from step {record.step}, row {position:,} of the data")
    first = int(state["step"])

    shape = plan.batch_shape
    places = parallel.local_places(parallel.sharding(mesh, ("batch", "length")), (shape[1], shape[2]))
    every_place = [a * shape[1] + p for a in range(shape[0]) for p in places]
    batches = loader.training_batches(
        sources, config.data.weights, seed=config.data.seed, size=config.data.batch, places=every_place,
        start=position, idle_weight=config.data.idle_weight, workers=config.data.workers,
    )  # fmt: skip
    facts = {
        "mesh": spec.name, "template": template.name, "tokenizer": fingerprint(template.tokenizer),
        "data": [{"name": s.name, "rows": len(s), "hash": getattr(getattr(s, "manifest", None), "hash", "")}
                 for s in sources],
        "jax": jax.__version__,
    }  # fmt: skip
    if jax.process_index() == 0:
        with atomic_write(workdir / "config.json") as f:
            json.dump(to_dict(config), f, indent=1)

    def record_at(done: int) -> Record:
        return Record(done, position, to_dict(config), facts)

    metrics = Metrics(workdir, config, first)
    run_step, evaluate = steps.jitted_step(plan), make_evaluation(plan, held_out)
    peak = flops.peak(spec)
    bad_in_a_row, code = 0, 0
    window = Window()
    tracing = Tracing(profile, workdir / "profile")
    with jax.set_mesh(mesh), Stopper() as stopper, contextlib.closing(store), contextlib.closing(metrics), tracing:
        for done in range(first, config.optim.steps):
            tracing.before(done)
            began = time.monotonic()
            try:
                local = next(batches)
            except UserError:
                raise
            except Exception as e:
                raise UserError(f"{', '.join(s.name for s in sources)}: a row cannot be read ({e}); pack again") from e
            window.waited += time.monotonic() - began
            batch = to_device(plan, local, places)
            state, out = run_step(state, frozen, batch)
            position += config.data.batch
            out = {k: v.item() for k, v in jax.device_get(out).items()}  # waits for the step
            now = done + 1
            window.add(out["tokens"], config.data.batch * config.data.length)
            tracing.after(now)

            trouble = "" if out["finite"] and not out["spike"] else "spike" if out["finite"] else "not finite"
            bad_in_a_row = bad_in_a_row + 1 if trouble else 0
            if trouble:
                ids = [sources[s].row_id(r) for s, r in local.rows]
                what = (
                    f"step {now}: loss {out['loss']:.4g}, |g| {out['grad_norm']:.4g}: {trouble}; rows {'; '.join(ids)}"
                )
                metrics.write(now, {"trouble": trouble, "rows": ids, **_line(out, window, plan, peak)})
                if config.trouble.action == "stop" or bad_in_a_row >= config.trouble.most:
                    logging.error("%s", what)
                    say(f"stopped: {what} (--config.trouble.action=skip passes such steps over)")
                    code = EXIT_TROUBLE
                    break
                logging.warning("%s; skipped", what)
            elif now % config.log.every == 0 or now == config.optim.steps or done == first:
                metrics.write(now, _line(out, window, plan, peak))
                window = Window()
            last = now == config.optim.steps
            if held_out and (last or (config.log.eval_every and now % config.log.eval_every == 0)):
                metrics.write(now, {"eval": evaluate(state, frozen)})
                window = Window()
            stop = stopper.asked(now)
            if last or stop or (config.checkpoint.every and now % config.checkpoint.every == 0):
                store.save(state, record_at(now))
            store.poll()
            if stop and not last:
                store.finish()
                say(f"told to stop: saved step {now}; start the same command again to go on (exit code {EXIT_AGAIN})")
                code = EXIT_AGAIN
                break
        else:
            store.finish()
            if config.checkpoint.export:
                export(plan, state, frozen, template, workdir / EXPORT, record_at(config.optim.steps))
                say(f"wrote {workdir / EXPORT}: duplex-jax chat --model={workdir}")
    return code


def say(text: str) -> None:
    """Prints on the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)


def resolve_branch(config: Config) -> tuple[Config, Path | None]:
    """A config whose decay starts at the step of its `decay_from`, and that checkpoint's folder.

    Raises:
        UserError: there is no such checkpoint, or it lies in its run's warm-up or decay.
    """
    where = config.optim.decay_from
    if not where:
        return config, None
    if config.optim.schedule != "wsd":
        raise UserError(f"config.optim.decay_from={where}: only schedule wsd has a stable phase, not "
                        f"{config.optim.schedule}")  # fmt: skip
    folder, step = checkpoints.stable_checkpoint(where)
    old = checkpoints.read_record(folder).config["optim"]
    known = {f.name for f in dataclasses.fields(config.optim)}
    there = phase(dataclasses.replace(config.optim, **{k: v for k, v in old.items() if k in known}), step)
    if there != "stable":
        raise UserError(f"config.optim.decay_from={where}: step {step} is in the {there} phase; give a stable one")
    steps_ = step + config.optim.decay_steps
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=steps_)), folder


def load_start(config: Config, template: Template) -> tuple[MiniCPM | None, ModelConfig]:
    """The model to start from, on the host, and its shape; None for weights to be drawn.

    Raises:
        UserError: the tokenizer does not fit the model.
    """
    chosen = config.model
    if chosen.source:
        loaded = load_model(
            chosen.source, dtype="float32", template=template.name, vocab_multiple=chosen.vocab_multiple
        )
        if chosen.tokenizer and fingerprint(loaded.tokenizer) != fingerprint(template.tokenizer):
            raise UserError(f"config.model.tokenizer={chosen.tokenizer}: is not the tokenizer of {chosen.source}, "
                            "whose weights know its own; leave model.tokenizer empty")  # fmt: skip
        return loaded.model, loaded.config
    assert chosen.shape is not None
    rows = max(chosen.shape.vocab_size, template.tokenizer.vocab_size)
    return None, dataclasses.replace(chosen.shape, vocab_size=rows, vocab_multiple=chosen.vocab_multiple)


def warn_of_changes(record: Record, config: Config, spec: parallel.MeshSpec) -> None:
    """Names what a run that goes on does otherwise than before."""
    before, now = record.config, to_dict(config)
    for group in ("model", "data", "optim", "lora"):
        for name, value in now[group].items():
            if name in before.get(group, {}) and before[group][name] != value:
                logging.warning("config.%s.%s was %s and is now %s", group, name, before[group][name], value)
    if record.facts.get("mesh") not in (None, spec.name):
        logging.warning("mesh was %s and is now %s: losses agree within rounding", record.facts["mesh"], spec.name)


def to_device(plan: steps.Plan, local: loader.Batch, places: list[int]) -> dict[str, Any]:
    """A process's rows as global arrays `[A, B, T]`."""
    A, B, T = plan.batch_shape
    out = {}
    at = {place: i for i, place in enumerate(places)}
    for name, array in local.arrays.items():
        array = array.reshape(A, len(places), T)

        def part(index: Any, array: np.ndarray = array) -> np.ndarray:
            rows = [at[i] for i in range(*index[1].indices(B))]
            return array[index[0], rows[0] : rows[-1] + 1, index[2]]

        out[name] = jax.make_array_from_callback((A, B, T), plan.batch_sharding, part)
    return out


@dataclasses.dataclass
class Window:
    """What happened since the last line: time, tokens, room for tokens, and seconds waiting for data."""

    began: float = dataclasses.field(default_factory=time.monotonic)
    steps: int = 0
    tokens: int = 0
    room: int = 0
    waited: float = 0.0

    def add(self, tokens: int, room: int) -> None:
        """Counts a step."""
        self.steps += 1
        self.tokens += int(tokens)
        self.room += room


def _line(out: dict[str, Any], window: Window, plan: steps.Plan, peak: float) -> dict[str, Any]:
    seconds = max(1e-9, time.monotonic() - window.began)
    rate = window.room / seconds
    return {
        "loss": out["loss"], "lr": out["lr"], "grad_norm": out["grad_norm"], "loss_weight": out["loss_weight"],
        "tokens_per_second": rate,
        "mfu": flops.mfu(rate, plan.model, plan.config.data.length, plan.is_lora, peak),
        "packing": window.tokens / max(1, window.room), "data_wait": window.waited,
        "step_seconds": seconds / max(1, window.steps), "memory_gib": memory_gib(),
    }  # fmt: skip


def make_evaluation(plan: steps.Plan, sources: list[dataset.RowSource]) -> Any:
    """A function of state and frozen weights that gives loss, perplexity and idle decisions, by category."""
    if not sources:
        return None
    names = loader.categories(sources)
    compiled = steps.jitted_eval(plan, len(names))
    _, B, T = plan.batch_shape
    sharding = parallel.sharding(plan.mesh, steps.BATCH_LOGICAL[1:])
    places = parallel.local_places(sharding, (B, T))

    def evaluate(state: steps.State, frozen: Any) -> dict[str, Any]:
        sums: dict[str, np.ndarray] = {}
        read = loader.evaluation_batches(sources, B, places, plan.config.data.idle_weight, plan.config.log.eval_batches)
        for local in read:
            batch = {k: parallel.global_array(sharding, (B, T), v, places) for k, v in local.arrays.items()}
            out = jax.device_get(compiled(state["params"], frozen, batch))
            sums = {k: sums.get(k, 0) + np.asarray(v, np.float64) for k, v in out.items()}
        total = summary({k: float(v.sum()) for k, v in sums.items()})
        total["by_category"] = {
            name: summary({k: float(v[i]) for k, v in sums.items()}) for i, name in enumerate(names)
        }
        return total

    return evaluate


def summary(sums: dict[str, float]) -> dict[str, Any]:
    """Loss, perplexity and idle precision, recall and F1 from `eval_step`'s sums; None where nothing was counted."""

    def share(a: float, b: float) -> float | None:
        return a / b if b else None

    loss = share(sums["loss"], sums["weight"])
    precision = share(sums["idle_right"], sums["idle_said"])
    recall = share(sums["idle_right"], sums["idle_wanted"])
    both = sums["idle_said"] + sums["idle_wanted"]
    return {
        "loss": loss, "perplexity": None if loss is None else math.exp(min(loss, 50.0)),
        "idle_precision": precision, "idle_recall": recall, "idle_f1": share(2 * sums["idle_right"], both),
        "decisions": int(sums["decisions"]),
    }  # fmt: skip


class Stopper(contextlib.AbstractContextManager):
    """Notes SIGTERM; `asked` says whether every process shall save and stop at this step."""

    def __init__(self):
        self._told = False
        self._before: Any = None

    def __enter__(self) -> "Stopper":
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self._told = True

    def asked(self, step: int) -> bool:
        """True once the process was told to stop; with several processes, at the same step in all of them."""
        if jax.process_count() == 1:
            return self._told
        # JAX's own preemption service listens for SIGTERM and agrees on a step.
        return bool(multihost_utils.reached_preemption_sync_point(step))

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
