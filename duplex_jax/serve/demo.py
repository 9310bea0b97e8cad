"""The plain-text protocol of the paper's demo servers, so that its web client works unchanged.

There are two. The duplex server listens on port 8765: every message is a user slice (`<idle>` for silence), and the
assistant's words come back as one text, nothing for silence, with line ends instead of full stops, which the client
speaks sentence by sentence. The ordinary server listens on port 8766: every message is a query, its answer is streamed
unchanged, and `<!end!>` follows it. On either port `<!new_session!>` and `<!new_ordinary_session!>` begin a new duplex
or turn-based conversation. `<!too_long!>` ends a turn-based conversation whose context is full; duplex sessions are
unlimited.
"""

import contextlib

from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.serve.connection import Caller, Connection
from duplex_jax.serve.events import Delta, Event, Spoken, Trouble
from duplex_jax.serve.hub import Full
from duplex_jax.serve.incoming import check_values, converse
from duplex_jax.serve.sessions import Entry, Sessions
from duplex_jax.serve.settings import Settings
from duplex_jax.serve.typed import MOST_WAITING
from duplex_jax.timeline import IDLE

NEW_SESSION, NEW_ORDINARY_SESSION = "<!new_session!>", "<!new_ordinary_session!>"
TOO_LONG, END = "<!too_long!>", "<!end!>"

MOST_TOKENS = 1024
"""Most tokens of an ordinary answer."""

ORDINARY_PORT = 8766
"""Port on which the client expects the ordinary server."""


class Demo:
    """One connection of the demo's client.

    Args:
        connection: its websocket.
        sessions: the server's sessions.
        client: the client to which sessions are attributed.
        ordinary: whether the conversation is turn-based until the client requests another one.
        sampling: sampling settings.
        seed: seed of the first session; each further one adds 1.
    """

    def __init__(
        self,
        connection: Connection,
        sessions: Sessions,
        client: Caller,
        ordinary: bool = False,
        sampling: Sampling | None = None,
        seed: int = 0,
    ):
        self._connection, self._sessions, self._client = connection, sessions, client
        self._sampling, self._seed = sampling or Sampling(), seed
        self._entry: Entry | None = None
        self._mode = NEW_ORDINARY_SESSION if ordinary else NEW_SESSION
        self._waiting = 0
        self._over = False

    async def run(self) -> None:
        """Handles messages until the client disconnects."""
        try:
            await converse(self._connection, self._handle, self._refuse)
        finally:
            await self._end()
            await self._connection.close()

    def _refuse(self, error: UserError) -> None:
        """Reports an error; the protocol has a message only for a full server."""
        if isinstance(error, Full):
            self._connection.send("All places are taken; try again later.")
        elif self._mode == NEW_ORDINARY_SESSION:
            self._connection.send(END)  # the client waits for this

    async def _handle(self, data: str | bytes) -> bool:
        message = data.strip() if isinstance(data, str) else ""
        if not message:
            return True
        if message in (NEW_SESSION, NEW_ORDINARY_SESSION):
            self._mode, self._over = message, False
            await self._end()
            return True
        if self._over:  # like the demo server, until a new session is requested
            self._tell_over()
            return True
        check_values({"message": message})
        if len(message) > MOST_WAITING:
            self._tell_over()
            return True
        if self._entry is None:
            await self._begin()
        assert self._entry is not None
        # If a client sends faster than it is answered, silences that wait are merged.
        if message == IDLE and (self._waiting or self._mode == NEW_ORDINARY_SESSION):
            return True
        self._entry.live.slice(None if message == IDLE else message)
        self._waiting += 1
        return True

    def _tell_over(self) -> None:
        self._connection.send(TOO_LONG)
        if self._mode == NEW_ORDINARY_SESSION:
            self._connection.send(END)

    async def _begin(self) -> None:
        ordinary = self._mode == NEW_ORDINARY_SESSION
        settings = Settings(
            mode="turn_based" if ordinary else "duplex",
            clock="client",
            sampling=self._sampling,
            seed=self._seed,
            max_tokens=MOST_TOKENS,
        )
        self._seed += 1
        self._waiting = 0
        self._entry = await self._sessions.begin(self._client, settings, self._emit)

    async def _end(self) -> None:
        if self._entry is not None:
            entry, self._entry = self._entry, None
            with contextlib.suppress(UserError):
                await self._sessions.end(entry)

    def _emit(self, event: Event) -> None:
        ordinary = self._mode == NEW_ORDINARY_SESSION
        match event:
            case Delta() if event.text:
                self._connection.send(event.text)
            case Spoken():
                self._waiting = max(0, self._waiting - 1)
                if ordinary:
                    self._connection.send(END)
                elif event.assistant is not None:
                    self._connection.send(event.assistant.replace(".", "\n"))
            case Trouble(fatal=True):
                self._waiting, self._over = max(0, self._waiting - 1), True
                self._tell_over()
            case Trouble(code="slice_refused"):
                self._waiting = max(0, self._waiting - 1)
                if ordinary:  # the query does not fit, but the next one may
                    self._tell_over()
