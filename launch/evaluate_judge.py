"""`duplex-jax evaluate judge`: MT-Bench and MT-Eval, turn-based and in slices, judged by a model."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from data_gen.progress import Progress
from duplex_jax.decode.engine import Engine
from duplex_jax.errors import UserError
from duplex_jax.evaluate.behaviour_run import Records, check_settings, model_settings
from duplex_jax.evaluate.conversations import WAYS, Asking, ask_questions, make_engine
from duplex_jax.evaluate.judge import judging
from duplex_jax.evaluate.judge import report as reports
from duplex_jax.evaluate.judge.judging import JudgeModel
from duplex_jax.evaluate.judge.prompts import Prompts, read_prompts
from duplex_jax.evaluate.judge.systems import System, pairs_of, read_beside, records_path
from duplex_jax.evaluate.judge.tasks import RULED, TABLE_5, TASKS, Questions, read_questions
from duplex_jax.evaluate.reports import made_with, publish
from duplex_jax.llm.cache import ReplyCache
from duplex_jax.llm.client import Client, Stopped
from launch import app
from launch.requests import RequestFlags

EXIT_UNFINISHED = 3

_MODEL = app.path_flag("model", None, "Model: a folder, a file, hf:owner/name, or a known name.")
_TASKS = flags.DEFINE_list("tasks", ["mt_bench", *TABLE_5], f"Tasks: any of {', '.join(TASKS)}.")
_WAYS = flags.DEFINE_list("ways", ["turn_based", "duplex"], f"Prompting modes: any of {', '.join(WAYS)}.")
_DATA = app.path_flag("data", None, "Folder with the questions and the judge's prompts.")
_OUT = app.path_flag("out", None, "Output folder; an interrupted run resumes from it.")
_LIMIT = flags.DEFINE_integer(
    "limit", 0, "Maximum number of questions per task, the same for every model; 0 for all.", 0
)
_BESIDE = app.paths_flag("beside", "Folders with other models' judged answers, for comparison.")
_PAIRWISE = flags.DEFINE_bool(
    "pairwise", False, "Also have the judge compare MT-Bench answers in pairs, in both orders."
)
_TEMPLATE = app.template_flag()
_ROWS = flags.DEFINE_integer("rows", 8, "Number of conversations run at once (batch size).", lower_bound=1)
_CAPACITY = flags.DEFINE_integer("capacity", None, "Maximum context length in tokens; 4096 by default.", lower_bound=1)
_SAMPLING = app.SamplingFlags(__name__)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed.")
_SYSTEM = flags.DEFINE_string("system", None, "System prompt; none by default.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 4096, "Maximum length of an answer in tokens.", lower_bound=1)
_QUIET = flags.DEFINE_integer(
    "quiet", 3, "Number of silent slices after which an answer counts as finished.", lower_bound=1
)
_PATIENCE = flags.DEFINE_integer(
    "patience", 10, "Number of slices to wait for a model that has not started to answer.", lower_bound=1
)

_JUDGE = flags.DEFINE_string("judge_model", "", "Name of the judge model at --judge_url; if empty, nothing is judged.")
_FIELDS = app.path_flag(
    "judge_fields", None, "JSON file with extra fields for the judge's requests, by kind: rating, json, pair."
)
_REQUESTS = RequestFlags(
    __name__, "judge_url", "Number of times to ask the judge until a reply can be parsed.", "OUT/replies.sqlite"
)


def main(argv: list[str]) -> int:
    """Reads the questions, obtains missing answers and judgements, scores, and writes the report."""
    app.no_arguments(argv)
    if not (_MODEL.value and _DATA.value and _OUT.value):
        raise UserError("evaluate judge needs --model=M, --data=FOLDER and --out=FOLDER")
    tasks = app.names("tasks", _TASKS.value, TASKS)
    ways = app.names("ways", _WAYS.value, WAYS)
    if _PAIRWISE.value and not (_JUDGE.value and "mt_bench" in tasks):
        raise UserError("--pairwise needs --judge_model=NAME, and mt_bench among --tasks")
    _REQUESTS.check()
    judge = JudgeModel(_JUDGE.value, judging.read_fields(_FIELDS.value) if _FIELDS.value else {})
    sampling = _SAMPLING.sampling()
    asking = Asking(sampling, _SEED.value, _MAX_TOKENS.value, _QUIET.value, _PATIENCE.value, _SYSTEM.value)
    out = Path(_OUT.value)
    questions = {task: read_questions(task, _DATA.value) for task in tasks}
    prompts = read_prompts(_DATA.value, tasks) if _JUDGE.value else None
    judges = {task: found for task in tasks if (found := _judge_of(task, judge, prompts)) is not None}
    beside = [system for folder in _BESIDE.value for system in read_beside(folder, questions, _LIMIT.value, judges)]
    app.claim(out)
    settings, own = _answers(_MODEL.value, out, questions, ways, asking)
    pairs = pairs_of(own, beside)
    outcomes: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
    client_report: dict[str, Any] | None = None
    for task in (t for t in tasks if t in RULED):
        for system in own:
            system.verdicts[task] = judging.judge_by_rule(questions[task], system.texts[task])
    if prompts is not None:
        with contextlib.ExitStack() as stack:
            cache = ReplyCache(_REQUESTS.cache.value or out / "replies.sqlite")
            stack.callback(cache.close)
            client = _REQUESTS.client(cache, stack)
            try:
                _judge(questions, own, prompts, judge, client)
                if _PAIRWISE.value:
                    outcomes = _pairwise(questions["mt_bench"], pairs, prompts, judge, client)
            except (Stopped, judging.NoReply) as e:
                print("\n".join(client.report.lines("judge")))
                print(f"unfinished: {e}. Every answer and reply is kept; run the same command again to resume.")
                return EXIT_UNFINISHED
        client_report = client.report.as_json()
        print("\n".join([*client.report.lines("judge"), ""]))
    for task, whose in judges.items():
        for system in own:
            judging.write_verdicts(judging.verdicts_path(out, task, system.way), system.verdicts[task], whose)
    described = reports.describe(questions, _LIMIT.value, own, beside)
    versions = sorted({v.version for s in own for found in s.verdicts.values() for v in found if v.version})
    report: dict[str, Any] = settings | {
        **made_with("judge", "jax"),
        "judge": None if prompts is None else {
            "model": judge.name, "fields": judge.fields, "versions": versions, "url": _REQUESTS.url.value,
            "temperature": 0, "attempts": _REQUESTS.attempts.value, "prompts": prompts.sha256,
            "requests": client_report,
        },
        "tasks": described,
        "averages": reports.averages(own),
        "comparisons": reports.compare(tasks, pairs, outcomes),
        "not_comparable": reports.not_comparable({t: described[t] for t in judges}, judge, versions),
    }  # fmt: skip
    publish(report, reports.section(report), out)
    return 0


def _judge_of(task: str, judge: JudgeModel, prompts: Prompts | None) -> dict[str, Any] | None:
    """The judge of a task, or None."""
    if task in RULED:
        return {"judge": judging.RULES}
    return judge.identity(prompts.sha256[task]) if prompts is not None else None


def _answers(
    name: str, out: Path, questions: Mapping[str, Questions], ways: list[str], asking: Asking
) -> tuple[dict[str, Any], list[System]]:
    """Obtains missing answers; returns the settings, and the model's answers by way."""
    from duplex_jax.checkpoint.registry import load_model

    app.use_compilation_cache()
    model = load_model(name, dtype="auto", template=_TEMPLATE.value)
    capacity = _CAPACITY.value or min(4096, model.config.max_position_embeddings)
    settings = {
        "what": "judge", "capacity": capacity, "temperature": asking.sampling.temperature,
        "top_p": asking.sampling.top_p, "top_k": asking.sampling.top_k, "seed": asking.seed, "system": asking.system,
        "max_tokens": asking.max_tokens, "quiet": asking.quiet, "patience": asking.patience,
    } | model_settings(name, model)  # fmt: skip
    check_settings(out, settings)
    most = max(len(of.chosen(_LIMIT.value)) for of in questions.values())

    @functools.cache
    def engine() -> Engine:
        rows = min(_ROWS.value, most)
        return make_engine(model, rows, capacity)

    own = [System(name, out, way) for way in ways]
    for task, of in questions.items():
        check_settings(out / task, {"questions": len(of.items), "sha256": of.sha256})
        numbers = of.chosen(_LIMIT.value)
        for system in own:
            records = Records(records_path(out, task, system.way))
            missing = sum(n not in records.rows for n in numbers)
            with Progress(f"conversations of {task}, {system.way}", missing) as progress:
                ask_questions(engine, task, of.items, numbers, system.way, asking, records, _counting(progress))
            system.add(task, of, records, numbers)
    return settings, own


def _counting(progress: Progress) -> Callable[[int], None]:
    tokens = 0

    def done(said: int) -> None:
        nonlocal tokens
        tokens += said
        progress.add(1, f"{tokens:,} tokens")

    return done


def _judge(
    questions: Mapping[str, Questions], own: list[System], prompts: Prompts, judge: JudgeModel, client: Client
) -> None:
    for task in (t for t in questions if t not in RULED):
        for system in own:
            with Progress(f"answers of {task}, {system.way}, judged", len(system.rows[task])) as progress:
                system.verdicts[task] = judging.judge_answers(
                    task, questions[task], system.texts[task], prompts, judge, client, progress.add
                )


def _pairwise(
    questions: Questions, pairs: list[tuple[System, System]], prompts: Prompts, judge: JudgeModel, client: Client
) -> dict[tuple[str, str], list[tuple[int, int, str]]]:
    outcomes = {}
    for a, b in pairs:
        ours, theirs = a.texts["mt_bench"], b.texts.get("mt_bench", {})
        both = sum(2 * len(questions.items[n].asked) for n in ours if n in theirs)
        with Progress(f"verdicts on {a.way} against {b.name}", both) as progress:
            outcomes[a.name, b.name] = judging.judge_pairs(
                questions, ours, theirs, prompts, judge, client, progress.add
            )
    return outcomes


def start() -> None:
    """Entry point."""
    app.run(main)


if __name__ == "__main__":
    start()
