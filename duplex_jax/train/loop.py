"""The training loop: what `duplex-jax train` does, from the first step to the last."""

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator
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
"""Exit code after SIGTERM: the run has saved and continues when started again (EX_TEMPFAIL of sysexits.h)."""

EXIT_TROUBLE = 3
"""Exit code after a loss spike, or a loss or gradient that was not finite, when the config says to stop."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """Steps to trace, `first` to `last`; the trace goes to `WORKDIR/profile`."""

    first: int
    last: int


class Tracing(contextlib.AbstractContextManager):
    """Traces a window of steps, even if the run resumes or ends within it."""

    def __init__(self, profile: Profile | None, folder: Path):
        self._profile, self._folder = profile, folder
        self._since: int | None = None

    def before(self, done: int) -> None:
        """Starts the trace if the step after `done` steps lies in the window."""
        window = self._profile
        if window is not None and self._since is None and window.first <= done < window.last:
            jax.profiler.start_trace(str(self._folder))
            self._since = done

    def after(self, done: int) -> None:
        """Ends the trace after the window's last step."""
        if self._since is not None and self._profile is not None and done >= self._profile.last:
            jax.profiler.stop_trace()
            print_once(f"trace of steps {self._since} to {done} in {self._folder}")
            self._since = None

    def __exit__(self, *_: Any) -> None:
        if self._since is not None:
            jax.profiler.stop_trace()


@dataclasses.dataclass
class _Run:
    """A run: its plan and data, its state on the mesh, and its progress.

    Attributes:
        sources: training data.
        batches: this process's part of every batch.
        places: rows of a micro-batch that this process holds.
        run_step: see `steps.jitted_step`.
        evaluate: see `make_evaluation`; None without evaluation data.
        peak: FLOP/s of all devices.
        step: number of updates done.
        position: number of rows consumed.
        facts: see `Record`.
    """

    plan: steps.Plan
    template: Template
    sources: list[dataset.RowSource]
    batches: Iterator[loader.Batch]
    places: list[int]
    store: Store
    state: steps.State
    frozen: Any
    run_step: Any
    evaluate: Any
    peak: float
    step: int
    position: int
    facts: dict[str, Any]

    def record(self) -> Record:
        """Metadata of a checkpoint at the current step."""
        return Record(self.step, self.position, to_dict(self.plan.config), self.facts)

    def next_batch(self) -> loader.Batch:
        """This process's rows of the next step."""
        try:
            return next(self.batches)
        except UserError:
            raise
        except Exception as e:
            raise UserError(f"{', '.join(s.name for s in self.sources)}: a row cannot be read ({e}); pack again") from e


def train(config: Config, spec: parallel.MeshSpec, workdir: Path, profile: Profile | None = None) -> int:
    """Trains a model, resuming from the newest complete checkpoint in `workdir` if there is one.

    Args:
        config: the run's settings.
        spec: the mesh; its devices must be present.
        workdir: folder for checkpoints, metrics and the exported model.
        profile: steps to trace.

    Returns:
        0 after the last step, `EXIT_AGAIN` after SIGTERM, `EXIT_TROUBLE` if a bad step stopped the run.

    Raises:
        UserError: settings, data, model and mesh do not fit together.
    """
    run = _prepare(config, spec, workdir)
    metrics, tracing = Metrics(workdir, run.plan.config, run.step), Tracing(profile, workdir / "profile")
    closing = contextlib.closing
    with jax.set_mesh(run.plan.mesh), Stopper() as stopper, closing(run.store), closing(metrics), tracing:
        code = _run_steps(run, metrics, tracing, stopper)
        if code == 0:
            run.store.finish()
            if run.plan.config.checkpoint.export:
                export(run.plan, run.state, run.frozen, run.template, workdir / EXPORT, run.record())
                print_once(f"wrote {workdir / EXPORT}: duplex-jax chat --model={workdir}")
    return code


def _prepare(config: Config, spec: parallel.MeshSpec, workdir: Path) -> _Run:
    """Checks that everything fits together, and builds or restores the state."""
    config, branch = resolve_branch(fit_batch(check(config), spec))
    if not config.data.train:
        raise UserError("config.data.train: is empty; give --config.data.train=DIR (packed, or a folder of timelines)")
    mesh = parallel.make_mesh(spec)

    # Cheap checks come first: tokenizer and data, then shapes, then weights.
    template = load_template(config.model.tokenizer or config.model.source, config.model.template)
    sources = [dataset.open_rows(path, template, config.data.length) for path in config.data.train]
    held_out = [dataset.open_rows(path, template, config.data.length) for path in config.data.eval]
    start, model = load_start(config, template)
    print_once("\n".join(to_lines(config)))  # after the checks, so that an error is the only output
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
        print_once(f"decay starts from {branch}")
    position = 0
    if restored is not None:
        state, record = restored
        position = record.position
        warn_of_changes(record, config, spec)
        print_once(f"goes on from step {record.step}, row {position:,} of the data")

    A, B, T = plan.batch_shape
    places = parallel.local_places(parallel.sharding(mesh, ("batch", "length")), (B, T))
    batches = loader.training_batches(
        sources, config.data.weights, seed=config.data.seed, size=config.data.batch,
        places=[a * B + p for a in range(A) for p in places], start=position, idle_weight=config.data.idle_weight,
        workers=config.data.workers,
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
    return _Run(
        plan=plan,
        template=template,
        sources=sources,
        batches=batches,
        places=places,
        store=store,
        state=state,
        frozen=frozen,
        run_step=steps.jitted_step(plan),
        evaluate=make_evaluation(plan, held_out),
        peak=flops.peak(spec),
        step=int(state["step"]),
        position=position,
        facts=facts,
    )


def _run_steps(run: _Run, metrics: Metrics, tracing: Tracing, stopper: "Stopper") -> int:
    """Runs the remaining steps; returns the exit code."""
    plan, config = run.plan, run.plan.config
    window, first, bad_in_a_row = Window(), run.step, 0
    timer = SaveTimer(config.checkpoint.every_minutes)
    while run.step < config.optim.steps:
        tracing.before(run.step)
        began = time.monotonic()
        local = run.next_batch()
        window.waited += time.monotonic() - began
        run.state, out = run.run_step(run.state, run.frozen, to_device(plan, local, run.places))
        run.position += config.data.batch
        out = {k: v.item() for k, v in jax.device_get(out).items()}  # waits for the step
        run.step += 1
        window.add(out["tokens"], config.data.batch * config.data.length)
        tracing.after(run.step)

        last = run.step == config.optim.steps
        trouble = "" if out["finite"] and not out["spike"] else "spike" if out["finite"] else "not finite"
        bad_in_a_row = bad_in_a_row + 1 if trouble else 0
        if trouble:
            rows = [run.sources[s].row_id(r) for s, r in local.rows]
            metrics.write(run.step, {"trouble": trouble, "rows": rows, **_line(out, window, plan, run.peak)})
            what = f"step {run.step}: loss {out['loss']:.4g}, |g| {out['grad_norm']:.4g}: {trouble}"
            what = f"{what}; rows {'; '.join(rows)}"
            if config.trouble.action == "stop" or bad_in_a_row >= config.trouble.most:
                logging.error("%s", what)
                print_once(f"stopped: {what} (--config.trouble.action=skip passes such steps over)")
                return EXIT_TROUBLE
            logging.warning("%s; skipped", what)
        elif last or run.step % config.log.every == 0 or run.step == first + 1:
            metrics.write(run.step, _line(out, window, plan, run.peak))
            window = Window()
        if run.evaluate and (last or (config.log.eval_every and run.step % config.log.eval_every == 0)):
            metrics.write(run.step, {"eval": run.evaluate(run.state, run.frozen)})
            window = Window()
        stop = stopper.asked(run.step)
        due = timer.due()  # evaluated at every step, because all processes take part in it
        if last or stop or due or (config.checkpoint.every and run.step % config.checkpoint.every == 0):
            run.store.save(run.state, run.record())
            timer.restart()
        run.store.poll()
        if stop and not last:
            run.store.finish()
            again = f"start the same command again to go on (exit code {EXIT_AGAIN})"
            print_once(f"told to stop: saved step {run.step}; {again}")
            return EXIT_AGAIN
    return 0


def print_once(text: str) -> None:
    """Prints on the first process only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def resolve_branch(config: Config) -> tuple[Config, Path | None]:
    """The config with `optim.steps` set to end the decay after its `decay_from`, and that checkpoint's folder.

    Raises:
        UserError: there is no such checkpoint, or it is from the warm-up or decay of its run.
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
    """The initial model on the host and its shape; None for the model if its weights are to be drawn.

    Raises:
        UserError: the tokenizer does not match the model.
    """
    chosen = config.model
    if chosen.source:
        loaded = load_model(
            chosen.source, dtype="float32", template=template.name, vocab_multiple=chosen.vocab_multiple
        )
        if chosen.tokenizer and fingerprint(loaded.tokenizer) != fingerprint(template.tokenizer):
            raise UserError(f"config.model.tokenizer={chosen.tokenizer}: is not the tokenizer of {chosen.source}, "
                            "which was trained with its own; leave model.tokenizer empty")  # fmt: skip
        return loaded.model, loaded.config
    assert chosen.shape is not None
    rows = max(chosen.shape.vocab_size, template.tokenizer.vocab_size)
    return None, dataclasses.replace(chosen.shape, vocab_size=rows, vocab_multiple=chosen.vocab_multiple)


def warn_of_changes(record: Record, config: Config, spec: parallel.MeshSpec) -> None:
    """Logs what a resumed run does differently from before."""
    before, now = record.config, to_dict(config)
    for group in ("model", "data", "optim", "lora"):
        for name, value in now[group].items():
            if name in before.get(group, {}) and before[group][name] != value:
                logging.warning("config.%s.%s was %s and is now %s", group, name, before[group][name], value)
    if record.facts.get("mesh") not in (None, spec.name):
        logging.warning("mesh was %s and is now %s: losses agree within rounding", record.facts["mesh"], spec.name)


def to_device(plan: steps.Plan, local: loader.Batch, places: list[int]) -> dict[str, Any]:
    """Combines the processes' rows into global arrays `[A, B, T]`."""
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
    """Counts since the last log line: seconds, tokens, token slots, and seconds spent waiting for data."""

    began: float = dataclasses.field(default_factory=time.monotonic)
    steps: int = 0
    tokens: int = 0
    room: int = 0
    waited: float = 0.0

    def add(self, tokens: int, room: int) -> None:
        """Adds one step."""
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
    """A function of state and frozen weights that returns loss, perplexity and idle decisions by category."""
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
    """Loss, perplexity and idle precision, recall and F1 from `eval_step`'s sums; None where a denominator is 0."""

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


class SaveTimer:
    """Says when a checkpoint is due by the clock, at the same step on every process; never for 0 minutes."""

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        """Starts the clock again, when a checkpoint is saved."""
        self._since = time.monotonic()

    def due(self) -> bool:
        """Whether the time has passed on the first process."""
        if not self._seconds:
            return False
        late = time.monotonic() - self._since >= self._seconds
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(late))) if jax.process_count() > 1 else late


class Stopper(contextlib.AbstractContextManager):
    """Catches SIGTERM; `asked` tells whether all processes should save and stop at this step."""

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
        """Whether the run was told to stop; with several processes, at the same step in all of them."""
        if jax.process_count() == 1:
            return self._told
        # JAX's preemption service listens for SIGTERM and agrees on a step.
        return bool(multihost_utils.reached_preemption_sync_point(step))

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
