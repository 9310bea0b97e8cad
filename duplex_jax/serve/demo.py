"""The plain-text protocol of the paper's own demo server, so that its web client works unchanged.

Every message is a user slice (`<idle>` for silence); what the assistant says comes back as text, silence as nothing.
`<!new_session!>` and `<!new_ordinary_session!>` begin a duplex and a turn-based conversation. Like that server, full
stops come back as line ends, which its client speaks sentence by sentence. Its `<!too_long!>` comes only where a
turn-based conversation is over: a duplex session has no end.
"""

import contextlib

from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.serve.connection import Caller, Connection
from duplex_jax.serve.events import Event, Spoken, Trouble
from duplex_jax.serve.hub import Full
from duplex_jax.serve.sessions import Entry, Sessions
from duplex_jax.serve.settings import Settings
from duplex_jax.timeline import IDLE

NEW_SESSION, NEW_ORDINARY_SESSION = "<!new_session!>", "<!new_ordinary_session!>"
TOO_LONG = "<!too_long!>"


class Demo:
    """One connection of the demo's client.

    Args:
        connection: its websocket.
        sessions: where its sessions live.
        client: whom they count for.
        sampling: of the answers.
        seed: of the first session; the next one has the next seed.
    """

    def __init__(
        self,
        connection: Connection,
        sessions: Sessions,
        client: Caller,
        sampling: Sampling | None = None,
        seed: int = 0,
    ):
        self._connection, self._sessions, self._client = connection, sessions, client
        self._sampling, self._seed = sampling or Sampling(), seed
        self._entry: Entry | None = None
        self._mode = NEW_SESSION
        self._waiting = 0
        self._over = False

    async def run(self) -> None:
        """Until the client goes."""
        try:
            async for data in self._connection.messages():
                message = data.strip() if isinstance(data, str) else ""
                if not message:
                    continue
                if message in (NEW_SESSION, NEW_ORDINARY_SESSION):
                    self._mode, self._over = message, False
                    await self._end()
                    continue
                try:
                    if self._over:  # as that server does, until a new session is asked for
                        self._connection.send(TOO_LONG)
                        continue
                    if self._entry is None:
                        await self._begin()
                    assert self._entry is not None
                    # A client that sends faster than it is answered: silences that wait become one.
                    if message == IDLE and self._waiting:
                        continue
                    self._entry.live.slice(None if message == IDLE else message)
                    self._waiting += 1
                except Full:
                    self._connection.send("All places are taken; try again later.")
                    return
                except UserError:
                    continue  # that server has no word for what was wrong with a message
        finally:
            await self._end()
            await self._connection.close()

    async def _begin(self) -> None:
        ordinary = self._mode == NEW_ORDINARY_SESSION
        settings = Settings(
            mode="turn_based" if ordinary else "duplex", clock="client", sampling=self._sampling, seed=self._seed
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
        if isinstance(event, Trouble) and (event.fatal or event.code == "slice_refused"):
            self._waiting = max(0, self._waiting - 1)
            if event.fatal:
                self._connection.send(TOO_LONG)
                self._over = True
        if isinstance(event, Spoken):
            self._waiting = max(0, self._waiting - 1)
            if event.assistant is not None:
                self._connection.send(event.assistant.replace(".", "\n"))
