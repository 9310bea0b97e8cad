"""`duplex-jax serve`: the real-time server with its web page and protocols."""

from absl import flags

from duplex_jax.errors import UserError, extra
from launch import app
from launch.listening import ListenFlags

_MODEL = app.path_flag("model", "smollm2-135m-duplex", "Model: a folder, a file, hf:owner/name, or a known name.")
_TEMPLATE = app.template_flag()
_LISTEN = ListenFlags(__name__, "this server")
_SESSIONS = flags.DEFINE_integer("sessions", 8, "Maximum number of simultaneous sessions (batch size).", lower_bound=1)
_WAITING = flags.DEFINE_integer("waiting", 64, "Maximum number of sessions waiting for a free row.", lower_bound=0)
_CAPACITY = flags.DEFINE_integer(
    "capacity", 2048, "Maximum context length of a session in tokens; the oldest pairs are dropped.", lower_bound=1
)
_STORES = app.StoreFlags(__name__)
_SLICE_SECONDS = flags.DEFINE_float("slice_seconds", 2.0, "Length of a time slice in seconds.", 0.1, 60.0)
_PER_CLIENT = flags.DEFINE_integer(
    "sessions_per_client", 8, "Maximum number of sessions per client address.", lower_bound=1
)
_SESSION_HOURS = flags.DEFINE_float("session_hours", 24, "Maximum length of a session in hours.", lower_bound=0.001)
_PARKED = flags.DEFINE_float("resume_seconds", 300, "Seconds that a session is kept after its client disconnects.", 0)
_ORIGINS = flags.DEFINE_list("allowed_origins", [], "Origins of other sites whose pages may connect; * allows all.")
_SNAPSHOT_KEY = app.path_flag(
    "snapshot_key_file",
    None,
    "Key file that signs snapshots; servers with the same key accept each other's. By default "
    "~/.cache/duplex_jax/snapshot.key.",
)
_REPLICAS = flags.DEFINE_integer(
    "replicas", 1, "Number of servers behind one port, on a Ray cluster; above 1 needs pip install 'duplex-jax[ray]'.",
    lower_bound=1,
)  # fmt: skip
_ORDINARY_PORT = flags.DEFINE_integer(
    "ordinary_port",
    None,
    "Second port, for the turn-based mode of the paper's web client, which expects 8766; none by default.",
    1,
    65535,
)
_MIND = app.MindFlags(__name__)
_VOICE = flags.DEFINE_bool(
    "voice", None, "Enable speech; needs pip install 'duplex-jax[voice]' and is on by default if that is installed."
)


def main(argv: list[str]) -> None:
    """Loads the model, compiles, and serves until it is stopped."""
    app.no_arguments(argv)
    _LISTEN.check()
    from duplex_jax.serve.build import Options, build_server
    from duplex_jax.serve.sessions import Limits

    limits = Limits(
        per_client=_PER_CLIENT.value, session_seconds=_SESSION_HOURS.value * 3600, parked_seconds=_PARKED.value
    )
    options = Options(
        model=_MODEL.value, template=_TEMPLATE.value, sessions=_SESSIONS.value, waiting=_WAITING.value,
        capacity=_CAPACITY.value, slice_seconds=_SLICE_SECONDS.value, limits=limits,
        api_key_file=_LISTEN.api_keys.value, allowed_origins=tuple(_ORIGINS.value),
        host=_LISTEN.host, allowed_hosts=_LISTEN.hosts,
        snapshot_key_file=_SNAPSHOT_KEY.value or Options.snapshot_key_file, voice=_VOICE.value,
        weights=_STORES.weights, entries=_STORES.entries,
        mind=_MIND.url, mind_model=_MIND.model, mind_filler_after=_MIND.filler_after,
    )  # fmt: skip
    if _REPLICAS.value > 1:
        if not _LISTEN.port or _LISTEN.has_tls:
            raise UserError(
                "--replicas: give a fixed --port, which the servers share, and no --tls_cert; terminate TLS at a proxy"
            )
        with extra("ray", "--replicas"):
            from launch.replicas import run
        run(options, _REPLICAS.value, _LISTEN.host, _LISTEN.port, lambda: _tell(options.name, _LISTEN.port))
        return
    with app.ends_at_once():
        app.use_compilation_cache()
        server = build_server(options, lambda text: print(text, flush=True))
    also = () if _ORDINARY_PORT.value is None else (_ORDINARY_PORT.value,)
    server.ordinary_port = _ORDINARY_PORT.value or server.ordinary_port
    _LISTEN.run(server.app(), lambda port: _tell(options.name, port), also)


def _tell(name: str, port: int) -> None:
    """Prints what listens, and where."""
    web, sockets = _LISTEN.url("http", port), _LISTEN.url("ws", port)
    print(f"{name} listens; Ctrl-C stops it\n  page     {web}/\n  duplex   {sockets}/v1/duplex\n  OpenAI   {web}/v1",
          flush=True)  # fmt: skip


def start() -> None:
    """Entry point."""
    app.run(main)


if __name__ == "__main__":
    start()
