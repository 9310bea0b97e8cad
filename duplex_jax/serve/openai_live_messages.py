"""What clients of OpenAI's Live protocol send (openai-python, `openai/types/live`), field by field.

`Any` stands where a value changes nothing here: `Session.unsupported` names those, and the client is told.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from duplex_jax.serve.incoming import Incoming, Refusal
from duplex_jax.serve.realtime_messages import DuplexOptions
from duplex_jax.serve.sound import ALAW, PCM, ULAW

RATES = {PCM: (16_000, 24_000), ULAW: (8_000,), ALAW: (8_000,)}
"""Samples a second that each encoding may have."""

MOST_APPENDED = 500
"""Tokens of instructions, thinking or commentary that one event may append."""

MEDIA = "sessions are begun over this websocket; there is neither WebRTC nor SIP"
ABSENT = {
    **dict.fromkeys(("decision.create", "decision.item.create", "decision.item.delete"), "there are no decisions"),
    "transport.dtmf.send": MEDIA,
    "session.output_audio.fixture.play": "there are no fixtures",
}
"""Events of the protocol that this server refuses by name."""


class Format(Incoming):
    """How sound is written, both ways."""

    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"] = "audio/pcm"
    rate: int = 24_000

    def check(self) -> None:
        """Refuses a rate that the encoding does not have."""
        if self.rate not in RATES[self.type]:
            rates = " or ".join(map(str, RATES[self.type]))
            path = "session.audio.format.rate"
            raise Refusal(f"{path}: is {self.rate}; {self.type} has {rates}", param=path)


class Output(Incoming):
    """The assistant's voice."""

    voice: Any = None


class Audio(Incoming):
    """Sound of both sides."""

    format: Format | None = None
    output: Output | None = None


class TextPart(Incoming):
    """The one part of an initial message."""

    text: str
    type: Literal["input_text", "text", "output_text"] | None = None


class InitialItem(Incoming):
    """A message of the conversation before the session."""

    role: Literal["developer", "user", "assistant"]
    content: list[TextPart] = Field(min_length=1, max_length=1)
    id: Any = None
    status: Any = None
    type: Literal["message"] | None = None


class Responses(Incoming):
    """The mind: who it is and what it is asked with."""

    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=8192)] | None = None
    parallel_tool_calls: Any = None
    reasoning: Any = None
    service_tier: Any = None
    text: Any = None
    tool_choice: str | dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class DelegationConfig(Incoming):
    """Who answers for the Live model."""

    type: Literal["client", "responses", "decisions"]
    acknowledgement_delay_ms: Annotated[int, Field(ge=0, le=600_000)] | None = None
    responses: Responses | None = None
    decisions: Any = None


class LiveOptions(DuplexOptions):
    """What the protocol has no word for."""

    audio: bool = True


class Session(Incoming):
    """What `session.start` begins a session with."""

    model: str | None = None
    audio: Audio | None = None
    client: Any = None
    delegation: DelegationConfig | None = None
    input: list[InitialItem] | None = Field(None, max_length=128)
    instructions: str | None = None
    safety_identifier: Any = None
    store: bool | None = None
    triggers: list[Any] | None = None
    duplex: LiveOptions | None = None

    def unsupported(self) -> list[str]:
        """Names of what was asked for and changes nothing."""
        voice = self.audio and self.audio.output and self.audio.output.voice
        asked = {"session.audio.output.voice": voice, "session.safety_identifier": self.safety_identifier}
        backend = self.delegation and self.delegation.responses
        for name in ("parallel_tool_calls", "reasoning", "service_tier", "text"):
            asked[f"session.delegation.responses.{name}"] = backend and getattr(backend, name)
        return [name for name, value in asked.items() if value]


class ResponseItem(Incoming):
    """`response.item.create`."""

    type: str
    event_id: str | None = None
    item: dict[str, Any]


class SessionStart(Incoming):
    """`session.start`."""

    type: str
    event_id: str | None = None
    session: Session


class SessionChange(Incoming):
    """What `session.update` may change."""

    delegation: DelegationConfig | None = None
    triggers: list[Any] | None = None


class SessionUpdate(Incoming):
    """`session.update`."""

    type: str
    event_id: str | None = None
    session: SessionChange


class AudioAppend(Incoming):
    """`session.input_audio.append`."""

    type: str
    event_id: str | None = None
    audio: str


class Played(Incoming):
    """`duplex.played`: samples of all the sound that was sent, as it is written on the wire."""

    type: str
    event_id: str | None = None
    samples: Annotated[int, Field(ge=0)]


class ContextAppend(Incoming):
    """`session.instructions.append`, `session.thinking.append` and `session.commentary.append`."""

    type: str
    event_id: str | None = None
    content: str
    delegation_id: str | None = None
