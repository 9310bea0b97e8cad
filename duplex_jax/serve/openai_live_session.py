"""What a Live session is set to, what developers added to it, and what is kept of it for forks."""

import copy
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

from duplex_jax.serve import openai_live_messages as messages
from duplex_jax.serve.calls import chat_tool_choice, chat_tools
from duplex_jax.serve.incoming import Refusal
from duplex_jax.serve.mind import Mind
from duplex_jax.serve.settings import Settings
from duplex_jax.serve.talk import Delegation


@dataclasses.dataclass(frozen=True)
class Note:
    """A developer's text in the system prompt; one that is not `kept` goes where room is needed."""

    text: str
    kept: bool


class SessionConfig:
    """The session as the protocol shows it.

    Args:
        model: the name of the server's model.
        slice_seconds: k where the client does not say.
        mind: the server's, which answers with `responses` delegation.
        speaks: whether the server has speech.
    """

    def __init__(self, model: str, slice_seconds: float, mind: Mind | None, speaks: bool):
        self._model, self._mind, self._speaks = model, mind, speaks
        self.format = messages.Format()
        self.store = False
        self.notes: list[Note] = []
        self._instructions = ""
        self._delegation: messages.DelegationConfig | None = None
        self._options = messages.LiveOptions(slice_seconds=slice_seconds)

    @property
    def spoken(self) -> bool:
        """Whether there is sound; else text alone."""
        return self._speaks and self._options.audio

    @property
    def tells_slices(self) -> bool:
        """Whether each interval is told, silent ones too."""
        return self._options.slices

    def begin(self, asked: messages.Session) -> list[tuple[str, str]]:
        """Takes what a new session is begun with; gives the turns that came before it.

        Raises:
            Refusal: something that cannot be done; names the field.
        """
        if asked.model is None:
            raise Refusal("session.model: is missing", "missing_required_parameter", "session.model")
        if asked.model != self._model:
            text = f"session.model: {asked.model[:80]!r} does not exist; this server has {self._model!r}"
            raise Refusal(text, "model_not_found", "session.model")
        self._take(asked)
        self._instructions = (asked.instructions or "").strip()
        if asked.duplex is not None:
            given = asked.duplex.model_dump(exclude_unset=True)
            self._options = self._options.model_copy(update=given)
        if asked.duplex is not None and "audio" in asked.duplex.model_fields_set and asked.duplex.audio:
            self._refuse_sound("session.duplex.audio")
        if asked.delegation is not None:
            self._delegation = self._delegates(asked.delegation)
        turns = [(item.role, item.content[0].text) for item in asked.input or ()]
        for place, (_, text) in enumerate(turns):
            if not text.strip():
                path = f"session.input[{place}].content[0].text"
                raise Refusal(f"{path}: holds no words", param=path)
        self.notes += [Note(text, True) for role, text in turns if role == "developer"]
        return [(role, text) for role, text in turns if role != "developer"]

    def copy(self) -> "SessionConfig":
        """The same, apart from this one."""
        new = copy.copy(self)
        new.notes = list(self.notes)
        return new

    def fork(self, asked: messages.Session) -> "SessionConfig":
        """The config of a fork.

        Raises:
            Refusal: it changes what a fork inherits.
        """
        allowed = {"audio", "client", "delegation", "store"}
        for name in sorted(asked.model_fields_set - allowed):
            text = f"session.{name}: a fork inherits it; it may set audio.format, delegation and store"
            raise Refusal(text, "immutable_parameter", f"session.{name}")
        new = self.copy()
        new._take(asked)
        if asked.delegation is not None:
            new.update(messages.SessionChange(delegation=asked.delegation))
        return new

    def update(self, change: messages.SessionChange) -> None:
        """Changes the delegation's settings.

        Raises:
            Refusal: it would change who answers, or cannot be.
        """
        self._refuse_triggers(change.triggers)
        if change.delegation is None:
            return
        old = self._delegation or messages.DelegationConfig(type="client")
        if change.delegation.type != old.type:
            path = "session.delegation.type"
            raise Refusal(f"{path}: is {old.type!r} and stays so", "immutable_parameter", path)
        new = change.delegation.model_dump(exclude_unset=True)
        if old.responses is not None:
            new["responses"] = old.responses.model_dump(exclude_unset=True) | (new.get("responses") or {})
        merged = old.model_dump(exclude_unset=True) | new
        self._delegation = self._delegates(messages.DelegationConfig.model_validate(merged))

    def shown(self, id: str, expires_at: int) -> dict[str, Any]:
        """The session object of the protocol."""
        delegation = self._delegation.model_dump(exclude_none=True) if self._delegation else {"type": "client"}
        return {
            "id": id,
            "model": self._model,
            "status": "active",
            "expires_at": expires_at,
            "instructions": self._instructions or None,
            "audio": {"format": self.format.model_dump()} if self.spoken else None,
            "delegation": delegation,
            "store": self.store,
            "triggers": [],
            "duplex": self._options.model_dump(exclude={"unsupported"}) | {"audio": self.spoken},
        }

    def settings(self) -> Settings:
        """What a session is begun with.

        Raises:
            UserError: a number that is out of range; names it.
        """
        return self._options.settings(self.system())

    def system(self, notes: list[Note] | None = None) -> str:
        """The system prompt: the instructions and what developers added, in order."""
        added = self.notes if notes is None else notes
        return "\n\n".join(filter(None, (self._instructions, *(note.text.strip() for note in added))))

    @property
    def target(self) -> str:
        """Who answers: `client` or `responses`."""
        return self._delegation.type if self._delegation else "client"

    def delegation(self) -> Delegation:
        """Who answers, as a session takes it."""
        asked = self._delegation
        backend = asked.responses if asked else None
        awaited = asked is not None and asked.type == "client"
        after = self._mind.filler_after if self._mind is not None and not awaited else None
        if asked is not None and asked.acknowledgement_delay_ms is not None:
            after = asked.acknowledgement_delay_ms / 1000
        return Delegation(
            told=True,
            awaited=awaited,
            filler_after=after,
            brief=backend.instructions if backend else None,
            max_tokens=backend.max_output_tokens if backend else None,
            tools=chat_tools(backend.tools if backend else None, "tools"),
            tool_choice=chat_tool_choice(backend.tool_choice if backend else None, "tool_choice"),
        )

    def _take(self, asked: messages.Session) -> None:
        """What new sessions and forks may set alike."""
        if asked.client is not None:
            raise Refusal(f"session.client: {messages.MEDIA}", "unsupported_parameter", "session.client")
        self._refuse_triggers(asked.triggers)
        if asked.audio is not None and asked.audio.format is not None:
            asked.audio.format.check()
            self._refuse_sound("session.audio.format")
            self.format = asked.audio.format
        if asked.store is not None:
            self.store = asked.store

    def _refuse_sound(self, path: str) -> None:
        if not self._speaks:
            text = f"{path}: this server has no speech; start it with --voice, or leave it out and send text"
            raise Refusal(text, "unsupported_parameter", path)

    def _refuse_triggers(self, triggers: list[Any] | None) -> None:
        if triggers:
            raise Refusal("session.triggers: there are no decisions", "unsupported_parameter", "session.triggers")

    def _delegates(self, asked: messages.DelegationConfig) -> messages.DelegationConfig:
        """Checks a delegation."""
        path = "session.delegation"
        if asked.type == "decisions" or asked.decisions is not None:
            text = f"{path}.type: there are no decisions; client or responses"
            raise Refusal(text, "unsupported_parameter", f"{path}.type")
        if asked.type == "client":
            if asked.responses is not None:
                raise Refusal(f"{path}.responses: goes with type 'responses'", param=f"{path}.responses")
            return asked
        if self._mind is None:
            text = f"{path}.type: this server has no model behind it; start it with --mind and --mind_model, or client"
            raise Refusal(text, "unsupported_parameter", f"{path}.type")
        path += ".responses"
        backend = asked.responses
        if backend is None:
            raise Refusal(f"{path}: is missing", "missing_required_parameter", path)
        if backend.model not in (None, self._mind.model):
            text = f"{path}.model: {str(backend.model)[:80]!r} does not exist; this server has {self._mind.model!r}"
            raise Refusal(text, "model_not_found", f"{path}.model")
        chat_tools(backend.tools, f"{path}.tools")
        chat_tool_choice(backend.tool_choice, f"{path}.tool_choice")
        return asked


@dataclasses.dataclass(frozen=True)
class Stored:
    """A session to fork: its sealed snapshot and what it was set to."""

    snapshot: str
    config: SessionConfig


class Store:
    """Sessions that may be forked, by their ids; of those that have ended the oldest are forgotten.

    Args:
        most: sessions that are kept.
    """

    def __init__(self, most: int = 256):
        self._most = most
        self._sessions: dict[str, Stored | Callable[[], Awaitable[Stored]]] = {}

    def put(self, id: str, state: Stored | Callable[[], Awaitable[Stored]]) -> None:
        """Keeps a session, or what gives it as it is when it is forked."""
        self._sessions.pop(id, None)
        self._sessions[id] = state
        while len(self._sessions) > self._most:
            del self._sessions[next(iter(self._sessions))]

    def remove(self, id: str) -> None:
        """Forgets a session."""
        self._sessions.pop(id, None)

    async def find(self, id: str) -> Stored:
        """A session as it is now.

        Raises:
            Refusal: it was not stored, or is forgotten.
        """
        if id not in self._sessions:
            text = f"session {id[:80]!r} cannot be forked: it was not begun with store, or is forgotten"
            raise Refusal(text, "session_not_found")
        state = self._sessions[id]
        return state if isinstance(state, Stored) else await state()
