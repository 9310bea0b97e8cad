"""A server out of its options: the model, its engine compiled, sessions, and everything behind one port."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from duplex_jax.errors import UserError
from duplex_jax.serve.access import Access, read_keys
from duplex_jax.serve.app import Server
from duplex_jax.serve.hub import Hub
from duplex_jax.serve.mind import make_mind
from duplex_jax.serve.protocol import VoiceFactory
from duplex_jax.serve.sessions import Limits, Sessions, snapshot_key

if TYPE_CHECKING:
    from duplex_jax.checkpoint.registry import LoadedModel
    from duplex_jax.decode.engine import Engine


@dataclasses.dataclass(frozen=True)
class Options:
    """What a server is started with.

    Attributes:
        model: see `registry.load_model`.
        template: how slices become tokens; the model's own by default.
        sessions: rows of the batch.
        waiting: newcomers that may wait for a row.
        capacity: tokens of a session's context.
        slice_seconds: k where a client does not say.
        limits: what is granted.
        api_key_file: keys, one a line; None asks for none.
        allowed_origins: pages of other servers that may connect.
        host: the address that is listened on.
        allowed_hosts: other names of this server; `*` for any.
        snapshot_key_file: signs snapshots.
        voice: hear and speak; None: where it is installed.
        mind: base URL of the chat model that gives the words of answers; None: the model's own.
        mind_model: its name there.
        mind_filler_after: see `Mind`.
        weights, entries: how the engine stores them; see `Engine`.
    """

    model: str = "smollm2-135m-duplex"
    template: str | None = None
    sessions: int = 8
    waiting: int = 64
    capacity: int = 2048
    slice_seconds: float = 2.0
    limits: Limits = dataclasses.field(default_factory=Limits)
    api_key_file: str | None = None
    allowed_origins: tuple[str, ...] = ()
    host: str = "localhost"
    allowed_hosts: tuple[str, ...] = ()
    snapshot_key_file: str = "~/.cache/duplex_jax/snapshot.key"
    voice: bool | None = None
    mind: str | None = None
    mind_model: str | None = None
    mind_filler_after: float | None = None
    weights: str | None = None
    entries: str | None = None

    @property
    def name(self) -> str:
        """The model's, as clients see it."""
        return Path(self.model).name if os.sep in self.model else self.model


def build_server(options: Options, tell: Callable[[str], None], prefix: str = "") -> Server:
    """Loads the model and compiles all that a session needs.

    Args:
        options: of the server.
        tell: is told what takes time.
        prefix: in front of every session's id, to tell servers apart.

    Raises:
        UserError: an option that cannot be.
    """
    keys = read_keys(options.api_key_file) if options.api_key_file else ()
    access = Access(keys, options.allowed_origins, (options.host, *options.allowed_hosts))
    key = snapshot_key(options.snapshot_key_file)
    mind = make_mind(options.mind, options.mind_model, options.mind_filler_after)
    model = load(options.model, options.template, tell)
    engine = build_engine(model, options.sessions, options.capacity, tell, options.weights, options.entries)
    sessions = Sessions(Hub(engine, waiting=options.waiting), options.limits, key, prefix, mind)
    return Server(
        sessions, options.name, access=access, slice_seconds=options.slice_seconds,
        make_voice=_load_voice(options.voice, tell),
    )  # fmt: skip


def load(name: str, template: str | None, tell: Callable[[str], None]) -> "LoadedModel":
    """A model that may be served: nothing that a user types becomes a control token.

    Raises:
        UserError: it cannot be loaded, or its template has no such promise.
    """
    from duplex_jax.checkpoint.registry import load_model
    from duplex_jax.template import refuse_typed_markers

    tell(f"loading {name}")
    model = load_model(name, dtype="auto", template=template, unread=True)
    refuse_typed_markers(model.template)
    return model


def build_engine(
    model: "LoadedModel", rows: int, capacity: int, tell: Callable[[str], None], weights: str | None = None,
    entries: str | None = None,
) -> "Engine":  # fmt: skip
    """Its engine, with all compiled that a session needs."""
    from duplex_jax.decode.engine import Engine

    engine = Engine(
        model.model, model.template, rows=rows, capacity=capacity, weights=weights, entries=entries
    )  # fmt: skip
    tell("compiling; later starts are faster")
    engine.warm_up(everything=True)
    return engine


def _load_voice(wanted: bool | None, tell: Callable[[str], None]) -> VoiceFactory | None:
    """Speech, where it was asked for or is installed."""
    if wanted is False:
        return None
    from duplex_jax.serve.voice.session import load_voice

    try:
        return load_voice()
    except UserError as e:
        if wanted:
            raise
        tell(f"text only: {e}")
        return None
