"""The plain-text protocol of the paper's own demo servers, so that its web client works unchanged.

There are two of them. The duplex one listens on port 8765: every message is a user slice (`<idle>` for silence), and
what the assistant says comes back as one text, silence as nothing, with line ends for full stops, which its client
speaks sentence by sentence. The ordinary one listens on port 8766: every message is a query, its answer comes in
pieces as it is made, as it is, and `<!end!>` follows it. `<!new_session!>` and `<!new_ordinary_session!>` begin a new
conversation, duplex or turn-based, on either port. `<!too_long!>` comes only where a turn-based conversation is over:
a duplex session has no end.
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
"""Of an ordinary answer."""

ORDINARY_PORT = 8766
"""Where the client looks for the ordinary server."""


class Demo:
    """One connection of the demo's client.

    Args:
        connection: its websocket.
        sessions: where its sessions live.
        client: whom they count for.
        ordinary: the conversation is turn-based until the client asks for another one.
        sampling: of the answers.
        seed: of the first session; the next one has the next seed.
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
        """Until the client goes."""
        try:
            await converse(self._connection, self._handle, self._refuse)
        finally:
            await self._end()
            await self._connection.close()

    def _refuse(self, error: UserError) -> None:
        """That server has no word for what was wrong with a message, but for a place that is taken."""
        if isinstance(error, Full):
            self._connection.send("All places are taken; try again later.")
        elif self._mode == NEW_ORDINARY_SESSION:
            self._connection.send(END)  # the client waits for it

    async def _handle(self, data: str | bytes) -> bool:
        message = data.strip() if isinstance(data, str) else ""
        if not message:
            return True
        if message in (NEW_SESSION, NEW_ORDINARY_SESSION):
            self._mode, self._over = message, False
            await self._end()
            return True
        if self._over:  # as that server does, until a new session is asked for
            self._tell_over()
            return True
        check_values({"message": message})
        if len(message) > MOST_WAITING:
            self._tell_over()
            return True
        if self._entry is None:
            await self._begin()
        assert self._entry is not None
        # A client that sends faster than it is answered: silences that wait become one.
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
                if ordinary:  # a query that does not fit; the next one may
                    self._tell_over()
