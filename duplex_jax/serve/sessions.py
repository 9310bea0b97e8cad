"""The registry of a server's live sessions: admission, queueing, resting, and resumption."""

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import hmac
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from duplex_jax.decode.snapshot import Snapshot
from duplex_jax.errors import UserError
from duplex_jax.serve.connection import Caller
from duplex_jax.serve.events import Event, Spoken, Trouble, Voice
from duplex_jax.serve.hub import Full, Hub, S
from duplex_jax.serve.live import LiveSession
from duplex_jax.serve.mind import Mind
from duplex_jax.serve.settings import Settings
from duplex_jax.serve.tasks import to_the_end

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        per_client: simultaneous sessions and requests of one address.
        session_seconds: maximum duration of a session.
        parked_seconds: how long a session waits for a client that disconnected.
        rest_after: seconds of mutual silence after which a session may be set aside for a newcomer.
        parked: most sessions that wait for disconnected clients.
    """

    per_client: int = 8
    session_seconds: float = 24 * 3600
    parked_seconds: float = 300
    rest_after: float = 20
    parked: int = 256


class NotFound(UserError):
    """There is no such session, or it belongs to another client."""


@dataclasses.dataclass(eq=False)
class Entry:
    """A session in the registry.

    Attributes:
        id: public id.
        token: secret that lets its client resume it.
        address: the client address to which it is attributed.
        live: the session.
        began: when it began.
        caller: the connection that holds it; None while it waits for its client.
        parked_at: since when it has been waiting.
        lock: held while it changes hands.
    """

    id: str
    token: str
    address: str
    live: LiveSession
    began: float
    caller: Caller | None = None
    parked_at: float | None = None
    lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)

    def give_to(self, caller: Caller | None) -> None:
        """Records which connection holds it."""
        if self.caller is not None:
            self.caller.sessions -= 1
        if caller is not None:
            caller.sessions += 1
        self.caller, self.parked_at = caller, None if caller is not None else time.monotonic()


class Sessions:
    """The registry of sessions.

    Args:
        hub: the hub that steps them.
        limits: the server's limits.
        key: signs snapshots; whoever has it can create contexts of arbitrary tokens.
        prefix: prefix of every session's id.
        mind: a chat model that provides the words of all sessions' answers.
    """

    def __init__(
        self, hub: Hub, limits: Limits | None = None, key: bytes | None = None, prefix: str = "",
        mind: Mind | None = None,
    ):  # fmt: skip
        self.hub, self.limits, self._prefix, self.mind = hub, limits or Limits(), prefix, mind
        self._key = key or secrets.token_bytes(32)
        self._entries: dict[str, Entry] = {}
        self._by_client: Counter[str] = Counter()
        self._keeper: asyncio.Task[None] | None = None
        self.on_step: Callable[[LiveSession, Spoken], None] = lambda session, spoken: None
        """Called with every slice of every session."""

    def start(self) -> None:
        """Starts to serve; must be called in the event loop."""
        self.hub.start()
        self._keeper = asyncio.create_task(self._keep(), name="sessions")

    async def close(self) -> None:
        """Ends every session."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await asyncio.gather(*(self.end(e) for e in list(self._entries.values())))
        if self.mind is not None:
            await self.mind.close()
        await self.hub.close()

    def counts(self) -> dict[str, int]:
        """Numbers of sessions with a row, set aside and without a client, and of waiting newcomers."""
        entries = self._entries.values()
        return {
            "active": sum(e.live.has_row for e in entries),
            "aside": sum(not e.live.has_row and e.parked_at is None for e in entries),
            "parked": sum(e.parked_at is not None for e in entries),
            "waiting": self.hub.waiting,
        }

    async def begin(
        self,
        caller: Caller,
        settings: Settings,
        emit: Callable[[Event], None],
        *,
        voice: Voice | None = None,
        snapshot: str | None = None,
        past: Sequence[tuple[str, str]] = (),
        on_wait: Callable[[int], None] | None = None,
    ) -> Entry:
        """Begins a session, new or from a signed snapshot, with optional past turns, as soon as a row is free.

        Raises:
            Full: the client has too many sessions, or too many wait.
            UserError: invalid settings or snapshot.
        """
        restored = self.unseal(snapshot) if snapshot is not None else None
        await self._enter(caller.address)
        live = LiveSession(self.hub, settings, emit, voice, self.mind)
        try:
            await self._make_room_where_full()
            await live.open(restored, on_wait, caller.gone)
            if past:
                await live.recall(past)
        except BaseException:
            await live.close()
            self._leave(caller.address)
            raise
        live.on_step = lambda spoken: self.on_step(live, spoken)
        id, token = self._prefix + secrets.token_hex(8), secrets.token_urlsafe(16)
        entry = self._entries[id] = Entry(id, token, caller.address, live, time.monotonic())
        entry.give_to(caller)
        live.start()
        return entry

    @contextlib.asynccontextmanager
    async def answering(self, caller: Caller, make: Callable[[], S]) -> AsyncIterator[S]:
        """A row for one request, which counts as a session of its client.

        Args:
            caller: the client.
            make: opens what occupies the row; see `Hub.open`.

        Raises:
            Full: as for `begin`.
        """
        await self._enter(caller.address)
        try:
            await self._make_room_where_full()
            lease = await self.hub.open(make, gone=caller.gone)
            try:
                yield lease.session
            finally:
                await lease.close()
        finally:
            self._leave(caller.address)

    async def take_up(self, id: str, token: str, emit: Callable[[Event], None], caller: Caller) -> Entry:
        """Resumes a session for its client; a connection that still holds it loses it.

        Raises:
            NotFound: it has ended, or the token is wrong.
        """
        entry = self._entries.get(id)
        if entry is None or not hmac.compare_digest(entry.token.encode(), token.encode("utf-8", "replace")):
            raise NotFound(f"session {id[:80]!r} has ended or is another's; start a new one")
        async with entry.lock:  # it may be leaving its row right now
            if id not in self._entries:
                raise NotFound(f"session {id!r} has ended; start a new one")
            if entry.caller is not None:  # its connection is lost, which was not noticed yet
                entry.live.emit(Trouble("taken_over", "another connection has resumed this session", fatal=True))
            entry.give_to(caller)
            entry.live.emit = emit
            entry.live.quiet_since = time.monotonic()
            entry.live.start()
        return entry

    async def park(self, entry: Entry, caller: Caller) -> None:
        """Parks a disconnected client's session: its clock stops, its row is released, and it waits on the host.

        Does nothing if another connection holds the session.
        """
        await to_the_end(self._park(entry, caller))

    async def _park(self, entry: Entry, caller: Caller) -> None:
        async with entry.lock:
            if entry.id not in self._entries or entry.caller is not caller:
                return
            entry.live.emit = lambda e: None
            await entry.live.stop()
            entry.give_to(None)
            if entry.live.settings.mode == "turn_based":
                await self.end(entry)
            else:
                await entry.live.set_aside(resting=False)
        parked = self._parked()
        if len(parked) > self.limits.parked:
            await self.end(parked[0])

    def _parked(self, address: str | None = None) -> list[Entry]:
        """Sessions that wait for their clients, of one address or of all, oldest first."""
        waiting = [e for e in self._entries.values() if e.parked_at is not None and address in (None, e.address)]
        return sorted(waiting, key=lambda e: e.parked_at or 0.0)

    async def end(self, entry: Entry) -> None:
        """Ends a session for good; idempotent."""
        if self._entries.pop(entry.id, None) is None:
            return
        self._leave(entry.address)
        if entry.caller is not None:
            entry.give_to(None)
        await to_the_end(entry.live.close())

    async def make_room(self) -> bool:
        """Sets aside the session that has been silent for longest; returns False if none is quiet enough."""
        now = time.monotonic()
        quiet = [
            e for e in self._entries.values() if e.live.may_rest and now - e.live.quiet_since >= self.limits.rest_after
        ]
        if not quiet:
            return False
        await min(quiet, key=lambda e: e.live.quiet_since).live.set_aside()
        return True

    async def _make_room_where_full(self) -> None:
        if not self.hub.free:
            await self.make_room()

    async def _enter(self, address: str) -> None:
        """Counts a session or a request of an address; if necessary, ends one of its parked sessions.

        Raises:
            Full: the address has too many.
        """
        while self._by_client[address] >= self.limits.per_client:
            parked = self._parked(address)
            if not parked:
                raise Full(f"{address} has {self.limits.per_client} sessions already; end one of them first")
            await self.end(parked[0])
        self._by_client[address] += 1

    def _leave(self, address: str) -> None:
        self._by_client[address] -= 1
        if not self._by_client[address]:
            del self._by_client[address]

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(1)
            try:
                await self._tidy()
            except Exception:
                _log.exception("sessions could not be looked after")

    async def _tidy(self) -> None:
        """Ends sessions that exceed the maximum duration, and makes room for those that wait."""
        now, limits = time.monotonic(), self.limits
        for entry in list(self._entries.values()):
            if now - entry.began > limits.session_seconds:
                hours = limits.session_seconds / 3600
                entry.live.emit(Trouble("session_limit", f"the session has lasted {hours:g} hours", fatal=True))
                await self.end(entry)
            elif entry.parked_at is not None and now - entry.parked_at > limits.parked_seconds:
                await self.end(entry)
        if self.hub.waiting:
            await self.make_room()

    # Snapshots are signed because they contain token ids, and clients must not create control tokens.

    async def seal(self, entry: Entry) -> str:
        """A signed snapshot as text, without the past, so that its length does not grow with the session."""
        data = (await entry.live.snapshot()).to_bytes(past=False)
        return base64.b64encode(self._sign(data) + data).decode()

    def unseal(self, text: str) -> Snapshot:
        """Inverse of `seal`.

        Raises:
            UserError: it was not signed with this server's key.
        """
        try:
            data = base64.b64decode(text, validate=True)
        except ValueError:
            data = b""
        signature, data = data[:32], data[32:]
        if not hmac.compare_digest(signature, self._sign(data)):
            raise UserError("the snapshot was not made by this server or was changed; send it back unchanged")
        return Snapshot.from_bytes(data)

    def _sign(self, data: bytes) -> bytes:
        return hmac.digest(self._key, data, hashlib.sha256)


def snapshot_key(path: str | Path) -> bytes:
    """Reads the key from a file; creates the file, readable only by its owner, if there is none.

    Raises:
        UserError: it cannot be read or created, or has no key.
    """
    path = Path(path).expanduser()
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _make_key(path)
        key = bytes.fromhex(path.read_text().strip())
    except ValueError:
        key = b""
    except OSError as e:
        raise UserError(f"{path}: the snapshot key cannot be read or created ({e.strerror}); give another file") from e
    if len(key) < 16:
        raise UserError(f"{path}: holds no key; write at least 32 hexadecimal digits, or remove the file to create one")
    return key


def _make_key(path: Path) -> None:
    """Creates a file with a new key, readable only by its owner from the start, unless another server was faster."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)
