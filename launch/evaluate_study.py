"""`duplex-jax evaluate study serve|report`: a user study of two anonymous models in the browser, and its statistics."""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags

from duplex_jax.errors import UserError
from duplex_jax.evaluate.plots import NEED, can_draw
from duplex_jax.evaluate.reports import made_with, publish
from duplex_jax.evaluate.study import store as stores
from duplex_jax.evaluate.study.plan import SYSTEMS, Texts, read_texts
from duplex_jax.files import check_writable
from launch import app
from launch.listening import ListenFlags

PARTS = ("serve", "report")
MODES = ("duplex", "turn_based")

_DB = app.path_flag("db", None, "Database file of the study; `serve` creates it if it is missing.")
_OUT = app.path_flag("out", None, "report: output folder.")
_CSV = flags.DEFINE_bool("csv", False, "report: also write scores.csv, one line per questionnaire.")
_TIMELINES = flags.DEFINE_bool(
    "timelines", False, "report: also write conversations.jsonl with the full text of every conversation."
)

_MODEL = {
    "a": app.path_flag(
        "model_a", "smollm2-135m-duplex", "First model: a folder, a file, hf:owner/name, or a known name."
    ),
    "b": app.path_flag("model_b", "smollm2-135m-instruct", "Second model, given in the same forms."),
}
_MODE = {
    "a": flags.DEFINE_enum("mode_a", "duplex", MODES, "Whether this model talks in slices or in whole turns."),
    "b": flags.DEFINE_enum("mode_b", "turn_based", MODES, "Whether this model talks in slices or in whole turns."),
}
_TEMPLATE = {s: app.template_flag(f"template_{s}") for s in SYSTEMS}
_SESSIONS = flags.DEFINE_integer("sessions", 5, "Number of conversations with each model; the paper has at least 5.", 1)
_OPENINGS = app.path_flag("openings", None, "File of opening sentences, one per line; by default the package's own.")
_NOTE = app.path_flag("note", None, "File of sample instructions, one per line; by default the package's own.")
_CONSENT = app.path_flag("consent", None, "File with the consent text; by default the package's own.")
_AT_ONCE = flags.DEFINE_integer(
    "at_once", 4, "Maximum number of simultaneous conversations per model; further participants wait.", lower_bound=1
)
_CAPACITY = flags.DEFINE_integer("capacity", 2048, "Maximum context length of a conversation in tokens.", lower_bound=1)
_SLICE_SECONDS = flags.DEFINE_float("slice_seconds", 2.0, "Length of a time slice in seconds.", 0.1, 60.0)
_SAMPLING = app.SamplingFlags(__name__)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 256, "Maximum length of a turn-based answer in tokens.", lower_bound=1)
_MINUTES = flags.DEFINE_float(
    "conversation_minutes", 30.0, "Maximum length of a conversation in minutes.", lower_bound=0.1
)
_GRACE = flags.DEFINE_float(
    "resume_seconds", 60.0, "Seconds that a conversation is kept after its page disconnects.", lower_bound=0.0
)
_LISTEN = ListenFlags(__name__, "the study")
_PER_HOUR = flags.DEFINE_integer(
    "participants_per_hour", 60, "Maximum number of participants per address and hour.", lower_bound=1
)


def main(argv: list[str]) -> None:
    """Runs the study, or reports its results."""
    if not argv or argv[0] not in PARTS:
        raise UserError(
            f"evaluate study needs a command, one of {', '.join(PARTS)}; for example: evaluate study serve --db=F"
        )
    app.no_arguments(argv[1:])
    if not _DB.value:
        raise UserError(f"evaluate study {argv[0]} needs --db=FILE")
    {"serve": _serve, "report": _report}[argv[0]](_DB.value)


def _serve(db: str) -> None:
    """Checks the flags, then runs the study on its database file."""
    _LISTEN.check()
    texts = read_texts(_SESSIONS.value, _CONSENT.value, _NOTE.value, _OPENINGS.value)
    app.claim(db, beside=True)
    store = stores.Store(db)
    try:
        store.agree({
            "openings": texts.openings, "note": texts.note, "consent": texts.consent, "capacity": _CAPACITY.value,
            "slice_seconds": _SLICE_SECONDS.value, **_SAMPLING.values(), "max_tokens": _MAX_TOKENS.value,
            **{f"model_{s}": _MODEL[s].value for s in SYSTEMS}, **{f"mode_{s}": _MODE[s].value for s in SYSTEMS},
        })  # fmt: skip
        _run(store, texts)
    finally:
        store.close()


def _run(store: stores.Store, texts: Texts) -> None:
    """Loads both models, and serves until it is stopped."""
    from duplex_jax.evaluate.behaviour_run import model_settings
    from duplex_jax.evaluate.study.server import StudyServer, System
    from duplex_jax.serve import build
    from duplex_jax.serve.access import Access, read_keys
    from duplex_jax.serve.hub import Hub
    from duplex_jax.serve.sessions import Limits, Sessions
    from duplex_jax.serve.settings import Settings

    keys = _LISTEN.api_keys.value
    access = Access(read_keys(keys) if keys else (), hosts=(_LISTEN.host, *_LISTEN.hosts))
    sampling = _SAMPLING.sampling()
    app.use_compilation_cache()
    limits = Limits(per_client=1, session_seconds=60 * _MINUTES.value)
    systems = {}
    for s in SYSTEMS:
        with app.ends_at_once():
            model = build.load(_MODEL[s].value, _TEMPLATE[s].value, _tell)
        store.agree({f"{k}_{s}": v for k, v in model_settings(_MODEL[s].value, model).items()})
        with app.ends_at_once():
            engine = build.build_engine(model, _AT_ONCE.value, _CAPACITY.value, _tell)
        mode: Any = _MODE[s].value
        settings = Settings(mode=mode, slice_seconds=_SLICE_SECONDS.value, sampling=sampling,
                            max_tokens=_MAX_TOKENS.value)  # fmt: skip
        systems[s] = System(Sessions(Hub(engine), limits), settings)
    server = StudyServer(store, systems, texts, access=access, grace=_GRACE.value, per_hour=_PER_HOUR.value)
    _LISTEN.run(
        server.app(), lambda port: _tell(f"the study listens; Ctrl-C stops it\n  page     {_LISTEN.url('http', port)}/")
    )


def _tell(text: str) -> None:
    print(text, flush=True)


def _report(db: str) -> None:
    if not _OUT.value:
        raise UserError("evaluate study report needs --out=FOLDER")
    from duplex_jax.evaluate.study import report as reports

    out = Path(_OUT.value)
    kept = stores.read(db)
    check_writable(out / "study.json")
    app.claim(out)
    report: dict[str, Any] = {
        "what": "study",
        **made_with("study", "scipy"),
        "data": {"path": db},
    } | reports.describe(kept)
    more = [reports.write_csv(kept, out)] if _CSV.value else []
    more += [reports.write_conversations(kept, out)] if _TIMELINES.value else []
    section = dataclasses.replace(reports.section(report), figures=reports.figures(report))
    publish(report, section, out, more)
    if not can_draw():
        print(NEED)


def start() -> None:
    """Entry point."""
    app.run(main)


if __name__ == "__main__":
    start()
