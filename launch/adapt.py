"""`duplex-jax adapt`: makes any chat model duplex with dialogues that it writes itself, in resumable stages.

  write      the model writes dialogues, including the users' messages             OUT/written
  timelines  they are cut into slices, in all categories, half of them as spoken   OUT/timelines
  pack       timelines and turns become rows of tokens                             OUT/packed
  train      a stable phase, then the decay                                        OUT/stable, OUT/decay
  measure    behaviour on held-out timelines, and yardsticks if given              OUT/behaviour, OUT/yardsticks
  export     the model or adapter, with a card that holds the measurements         OUT/model

Every stage runs commands of other jobs, which are printed first and can also be run alone.
"""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from data_gen.dialogues import count_dialogues
from duplex_jax.checkpoint.card import CARD_FILE
from duplex_jax.errors import UserError
from duplex_jax.files import atomic_folder, atomic_write
from launch import app
from launch.dotted import take_dotted

STAGES = ("write", "timelines", "pack", "train", "measure", "export")

_MODEL = app.path_flag("model", None, "The chat model: a folder, a file, hf:owner/name, or a known name.")
_OUT = app.path_flag("out", None, "Output folder; an interrupted run resumes from it.")
_HOURS = flags.DEFINE_float(
    "hours", None, "Hours for writing and training together; replaces --tokens.", lower_bound=0.01
)
_TOKENS = flags.DEFINE_float("tokens", 3e6, "Number of tokens to train on.", lower_bound=1)
_DIALOGUES = app.paths_flag("dialogues", "Files of your own dialogues, added to those that the model writes.")
_CONFIG = app.path_flag("config", "configs/adapt_lora.py", "Training config; --config.a.b=value overrides a field.")
_MESH = app.path_flag(
    "mesh", "cpu1", "Device mesh: a name from configs/mesh/, or a Python file that defines get_mesh()."
)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed.")
_COUNT = flags.DEFINE_integer(
    "count", 0, "Number of dialogues to write; 0 means one for every 600 tokens.", lower_bound=0
)
_ROWS = flags.DEFINE_integer("rows", 32, "Number of dialogues written at once (batch size).", lower_bound=1)
_SPOKEN = flags.DEFINE_float(
    "spoken", 0.5, "Share of timelines whose user text looks like speech recognition or chat.", 0.0, 1.0
)
_YARDSTICKS = app.path_flag("yardsticks", "", "Data folder for `evaluate yardsticks`; empty skips them.")
_STAGES = flags.DEFINE_list("stages", list(STAGES), "Stages to run; all by default.")

_DOTTED: list[tuple[str, str]] = []
# Timelines per written dialogue, by category.
_SHARES = {
    "basic": 2.0, "topic_interweaving": 0.4, "generation_termination": 2.2, "regeneration": 1.0, "dialogue_reset": 0.3,
    "back_on_topic": 0.6, "backchannel": 1.5, "hesitation": 2.5, "silence": 0.4, "opening": 0.3,
}  # fmt: skip
# Shares of rows with spoken timelines, the model's usual answers in slices, and the same in turns.
_WEIGHTS = {"spoken": 0.7, "plain": 0.2, "turns": 0.1}
# Fractions of --hours for writing, the stable phase and the decay.
_TIMES = {"write": 0.35, "stable": 0.45, "decay": 0.2}
# Fewest dialogues of a kind that can be split into training and held-out ones.
_FEWEST = 40
_EXIT_AGAIN = 75  # exit code of `train` after it was told to stop and saved


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a stage.

    Attributes:
        name: key under which it is recorded as done.
        argv: arguments of `duplex-jax`.
        seconds: time after which it is told to stop; 0 for never. What it did until then is used.
    """

    name: str
    argv: tuple[str, ...]
    seconds: float = 0.0


class Journal:
    """Records the finished commands of a folder in `OUT/adapt.json`, so that a killed run can be resumed.

    Raises:
        UserError: the folder holds a run with other settings.
    """

    def __init__(self, out: Path, settings: dict[str, object]):
        self._path = out / "adapt.json"
        self._state: dict[str, dict] = {"settings": settings, "done": {}, "seconds": {}}
        if self._path.exists():
            try:
                self._state = json.loads(self._path.read_text(encoding="utf-8"))
                for name in ("settings", "done", "seconds"):
                    if not isinstance(self._state[name], dict):
                        raise TypeError(f"{name} is no object")
                before = self._state["settings"]
            except (OSError, ValueError, KeyError, TypeError) as e:
                raise UserError(f"{self._path}: cannot be read ({e}); give another --out") from e
            for name, value in json.loads(json.dumps(settings)).items():
                if before.get(name) != value:
                    raise UserError(
                        f"--out={out}: holds a run with --{name}={before.get(name)}, and this one has {value}; "
                        "give the same flags to go on, or another --out"
                    )

    def is_done(self, name: str) -> bool:
        return name in self._state["done"]

    def spent(self, name: str) -> float:
        """Seconds that a command has run so far, over all runs."""
        return self._state["seconds"].get(name, 0.0)

    def note(self, name: str, seconds: float, done: bool) -> None:
        """Records how long a command ran and whether it is done."""
        self._state["seconds"][name] = self.spent(name) + seconds
        if done:
            self._state["done"][name] = True
        with atomic_write(self._path) as f:
            json.dump(self._state, f, indent=1)


def run(command: Command, journal: Journal) -> None:
    """Runs a command until it ends or its time is up.

    Raises:
        UserError: it failed.
    """
    if journal.is_done(command.name):
        return
    print(f"--- {command.name}: duplex-jax {' '.join(command.argv)}", flush=True)
    began, told = time.monotonic(), False
    left = command.seconds - journal.spent(command.name) if command.seconds else None
    process = subprocess.Popen([sys.executable, "-m", "launch.main", *command.argv])
    try:
        while True:
            try:
                code = process.wait(timeout=1.0)
                break
            except subprocess.TimeoutExpired:
                if left is not None and not told and time.monotonic() - began > left:
                    process.send_signal(signal.SIGTERM)
                    told = True
    except KeyboardInterrupt:
        process.wait()
        journal.note(command.name, time.monotonic() - began, done=False)
        raise
    done = code == 0 or (told and code in (_EXIT_AGAIN, -signal.SIGTERM))
    journal.note(command.name, time.monotonic() - began, done)
    if not done:
        raise UserError(f"{command.name}: duplex-jax {command.argv[0]} ended with code {code}; its last line says why")


def commands(stage: str, out: Path) -> Iterator[Command]:
    """The commands of a stage; later ones may depend on the output of earlier ones."""
    makers = (_write, _timelines, _pack, _train, _measure, _export)
    yield from makers[STAGES.index(stage)](out)


def _seconds(part: str) -> float:
    return _HOURS.value * 3600 * _TIMES[part] if _HOURS.value else 0.0


def _write(out: Path) -> Iterator[Command]:
    count = _COUNT.value or (1_000_000 if _HOURS.value else max(256, int(_TOKENS.value // 600)))
    yield Command(
        "write",
        ("generate", f"--write={count}", f"--model={_MODEL.value}", f"--out={out / 'written'}", f"--seed={_SEED.value}",
         f"--rows={_ROWS.value}"),
        _seconds("write"),
    )  # fmt: skip


def _inputs(out: Path) -> dict[str, Path]:
    """Folders of dialogues by kind: the model's own, where it wrote enough, and the user's."""
    written = {name: out / "written" / name for name in ("spoken", "plain")}
    found = {name: path for name, path in written.items() if (count_dialogues(path) or 0) >= _FEWEST}
    return found | {f"own{i}": Path(path) for i, path in enumerate(_DIALOGUES.value)}


def _packed(out: Path) -> dict[str, Path]:
    """The datasets to pack: timelines of all inputs, and the model's usual answers as turns."""
    found = {name: out / "timelines" / "train" / name for name in _inputs(out)}
    return found | ({"turns": out / "written" / "plain"} if "plain" in found else {})


def _timelines(out: Path) -> Iterator[Command]:
    for name, path in _inputs(out).items():
        plain = name == "plain"
        shares = {"basic": 1.0, "generation_termination": 0.2} if plain else _SHARES
        for part, fold in (("train", "-0/10"), ("held_out", "0/10")):
            yield Command(
                f"timelines {name} {part}",
                ("generate", f"--input={path}", f"--out={out / 'timelines' / part / name}", f"--seed={_SEED.value}",
                 f"--categories={','.join(shares)}", "--shares=" + ",".join(f"{k}={v}" for k, v in shares.items()),
                 "--max_idle_pairs=3", "--transitions=both", f"--spoken={_SPOKEN.value}", f"--fold={fold}",
                 f"--tokenizer={_MODEL.value}", *([] if plain else ["--spoken_words=70"])),
            )  # fmt: skip


def _pack(out: Path) -> Iterator[Command]:
    length = _config_of("data.length")
    for name, path in _packed(out).items():
        yield Command(
            f"pack {name}",
            ("pack", f"--input={path}", f"--out={out / 'packed' / name}", f"--model={_MODEL.value}",
             f"--template={_config_of('model.template') or 'compact'}", f"--length={length}",
             *([] if name == "turns" else ["--late=0.2"])),
        )  # fmt: skip


def _config_of(field: str):
    from duplex_jax.train import config as configs

    value = configs.override(configs.load_config(_CONFIG.value), _DOTTED)
    for name in field.split("."):
        value = getattr(value, name)
    return value


def _train(out: Path) -> Iterator[Command]:
    names = list(_packed(out))
    own = [n for n in names if n not in _WEIGHTS]
    # The user's own dialogues share the rows of spoken timelines.
    weights = {n: _WEIGHTS.get(n, 0.0) for n in names} | {n: 0.35 / len(own) for n in own}
    if own and "spoken" in weights:
        weights["spoken"] = 0.35
    tokens_of_step = _config_of("data.length") * _config_of("data.batch")
    steps = 1_000_000 if _HOURS.value else max(30, int(_TOKENS.value // tokens_of_step))
    decay = max(10, steps // 3)
    common = (
        "train", f"--config={_CONFIG.value}", f"--mesh={_MESH.value}",
        *(f"--config.{name}={value}" for name, value in _DOTTED),
        f"--config.model.source={_MODEL.value}",
        "--config.data.train=" + ",".join(str(out / "packed" / n) for n in names),
        "--config.data.weights=" + ",".join(f"{weights[n]:.3g}" for n in names),
    )  # fmt: skip
    # The stable phase ends a step early, because the decay begins at its last checkpoint.
    yield Command(
        "stable",
        (*common, f"--workdir={out / 'stable'}", f"--config.optim.steps={steps - decay + 1}",
         "--config.optim.decay_steps=1", "--config.checkpoint.export=False"),
        _seconds("stable"),
    )  # fmt: skip
    last = _last_step(out / "stable", steps - decay)
    if _HOURS.value:
        decay = max(10, int(last * _TIMES["decay"] / _TIMES["stable"]))
    yield Command(
        "decay",
        (*common, f"--workdir={out / 'decay'}", f"--config.optim.decay_from={out / 'stable'}@{last}",
         "--config.optim.decay=linear", f"--config.optim.decay_steps={decay}", "--config.optim.final=0.02"),
    )  # fmt: skip


def _last_step(workdir: Path, most: int) -> int:
    """The newest checkpoint of the stable phase."""
    from duplex_jax.train.checkpoints import FOLDER

    steps = [int(p.name) for p in (workdir / FOLDER).glob("[0-9]*") if p.name.isdigit() and int(p.name) <= most]
    return max(steps, default=most)


def _measure(out: Path) -> Iterator[Command]:
    model = out / "decay" / "export"
    yield Command(
        "behaviour",
        ("evaluate", "behaviour", f"--model={model}", f"--data={out / 'timelines' / 'held_out'}", "--limit=200",
         "--rows=16", f"--out={out / 'behaviour'}"),
    )  # fmt: skip
    if _YARDSTICKS.value:
        yield Command(
            "yardsticks",
            (
                "evaluate",
                "yardsticks",
                f"--model={model}",
                f"--data={_YARDSTICKS.value}",
                f"--out={out / 'yardsticks'}",
            ),
        )


def _export(out: Path) -> Iterator[Command]:
    measured = [str(out / name) for name in ("behaviour", "yardsticks") if (out / name).is_dir()]
    if measured:
        yield Command("report", ("evaluate", "report", *measured, f"--out={out / 'report'}"))
    target = out / "model"
    if not target.exists():
        with atomic_folder(target) as aside:
            shutil.copytree(out / "decay" / "export", aside, dirs_exist_ok=True)
            readme = aside / CARD_FILE
            prompting = readme.read_text(encoding="utf-8").partition("\n")[2] if readme.is_file() else ""
            readme.write_text(card(out) + prompting, encoding="utf-8")


def card(out: Path) -> str:
    """The model card: what the model is, how it was made, and what was measured."""
    blocks = [json.loads(p.read_text()) for p in sorted((out / "written" / "blocks").glob("*.json"))]
    tables = [p.read_text(encoding="utf-8") for name in ("behaviour", "yardsticks")
              for p in sorted((out / name).glob("*.md"))]  # fmt: skip
    return "\n".join([
        f"# {Path(str(_MODEL.value)).name}, duplex", "",
        f"`{_MODEL.value}` taught to converse in time slices of two seconds, from dialogues that it wrote itself "
        f"({sum(b['kept'] for b in blocks):,} of them, users' messages included)"
        + (" and dialogues of its trainer's own." if _DIALOGUES.value else "; its licence is its base's."),
        "", "    duplex-jax adapt " + " ".join(_again()), "", "## Figures", "", *tables, "",
    ])  # fmt: skip


def _again() -> list[str]:
    """The flags of this run that differ from their defaults."""
    names = ("model", "hours", "tokens", "dialogues", "config", "mesh", "seed", "count", "spoken")
    given = {name: flags.FLAGS[name].value for name in names if flags.FLAGS[name].present}
    said = [f"--{name}={','.join(v) if isinstance(v, list) else v}" for name, v in given.items()]
    return said + [f"--config.{name}={value}" for name, value in _DOTTED]


def main(argv: list[str]) -> int | None:
    """Runs the unfinished stages."""
    app.no_arguments(argv)
    if not (_MODEL.value and _OUT.value):
        raise UserError("adapt needs --model=MODEL, a chat model, and --out=FOLDER")
    chosen = app.names("stages", _STAGES.value, STAGES)
    for path in [*_DIALOGUES.value, *([_YARDSTICKS.value] if _YARDSTICKS.value else [])]:
        if not Path(path).exists():
            raise UserError(f"{path}: no such file or folder; --dialogues and --yardsticks must name existing paths")
    _config_of("name")  # reports an invalid config before anything is written
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    app.claim(out)
    settings = {
        name: flags.FLAGS[name].value for name in ("model", "hours", "tokens", "dialogues", "mesh", "seed", "spoken")
    }
    journal = Journal(out, settings | {"config": _CONFIG.value, "dotted": [list(d) for d in _DOTTED]})
    for stage in STAGES:
        if stage in chosen:
            for command in commands(stage, out):
                run(command, journal)
    print(f"{out / 'model'}: duplex-jax chat --model={out / 'model'}")
    return 0


def start() -> None:
    """Runs the job."""
    sys.argv[1:], dotted = take_dotted(sys.argv[1:])
    _DOTTED.extend(dotted)
    app.run(main)


if __name__ == "__main__":
    start()
