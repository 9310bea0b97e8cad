"""What clients of OpenAI's Realtime protocol send (openai-python, `openai/types/realtime`), field by field.

`Any` stands where this server does as it does whatever is asked for; `Session.unsupported` names those.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from duplex_jax.decode.sampling import Sampling
from duplex_jax.serve.incoming import Incoming, Refusal
from duplex_jax.serve.settings import Settings

RATE = 24_000
"""Samples a second on this protocol's wire, both ways."""

Id = Annotated[str, Field(min_length=1, max_length=256)]
MostTokens = Annotated[int, Field(ge=1, le=4096)] | Literal["inf"] | None

BETA = {
    "modalities": "output_modalities",
    "voice": "audio.output.voice",
    "speed": "audio.output.speed",
    "input_audio_format": "audio.input.format",
    "output_audio_format": "audio.output.format",
    "input_audio_transcription": "audio.input.transcription",
    "input_audio_noise_reduction": "audio.input.noise_reduction",
    "turn_detection": "audio.input.turn_detection",
    "max_response_output_tokens": "max_output_tokens",
    "temperature": "duplex.temperature",
}
"""Fields of the protocol's beta and where they are now."""


class Format(Incoming):
    """How sound is written."""

    type: str | None = "audio/pcm"
    rate: int | None = RATE

    def check(self, path: str) -> None:
        """Refuses sound that is written in another way."""
        if self.type not in (None, "audio/pcm") or self.rate not in (None, RATE):
            raise Refusal(f"{path}: audio/pcm at {RATE} is the only one", param=path)


class TurnDetection(Incoming):
    """Who says when a turn is over."""

    TUNING: ClassVar = ("threshold", "prefix_padding_ms", "silence_duration_ms", "idle_timeout_ms", "eagerness")
    type: Literal["server_vad", "semantic_vad"]
    create_response: bool | None = None
    interrupt_response: bool | None = None
    threshold: Any = None
    prefix_padding_ms: Any = None
    silence_duration_ms: Any = None
    idle_timeout_ms: Any = None
    eagerness: Any = None


class Input(Incoming):
    """The user's sound."""

    format: Format | None = None
    turn_detection: TurnDetection | None = None
    noise_reduction: Any = None
    transcription: Any = None


class Output(Incoming):
    """The assistant's sound."""

    format: Format | None = None
    voice: Any = None
    speed: Any = None


class AudioConfig(Incoming):
    """Sound of both sides."""

    input: Input | None = None
    output: Output | None = None


class DuplexOptions(Incoming):
    """What the protocol has no word for."""

    slice_seconds: float = 2.0
    slices: bool = False
    temperature: float = Sampling().temperature
    top_p: float = Sampling().top_p
    idle_bias: float = Sampling().idle_bias
    seed: int = 0
    dormant: bool = False
    unsupported: Any = None  # the server's own, sent back by clients that echo a session

    def settings(self, instructions: str) -> Settings:
        """What a session is begun with.

        Raises:
            UserError: a number that is out of range; names it.
        """
        return Settings(
            slice_seconds=float(self.slice_seconds),
            sampling=Sampling(float(self.temperature), float(self.top_p), idle_bias=float(self.idle_bias)),
            seed=self.seed,
            system=instructions or None,
            dormant=self.dormant,
        )


class Session(Incoming):
    """What `session.update` may change."""

    type: str | None = None
    id: Any = None
    object: Any = None
    expires_at: Any = None
    client_secret: Any = None
    model: str | None = None
    instructions: str | None = None
    output_modalities: list[str] | None = None
    audio: AudioConfig | None = None
    max_output_tokens: MostTokens = None
    tools: list[dict[str, Any]] | None = None  # each is checked by `check_tools`
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: Any = None
    include: Any = None
    prompt: Any = None
    reasoning: Any = None
    tracing: Any = None
    truncation: Any = None
    duplex: DuplexOptions | None = None

    def unsupported(self) -> set[str]:
        """Names of what was asked for and is not done, though the conversation can be held without it."""
        names = ("tools", "parallel_tool_calls", "include", "prompt", "reasoning", "tracing", "truncation")
        asked = {name: getattr(self, name) for name in names}
        sent = self.audio and self.audio.input
        parts: list[tuple[str, Incoming | None, tuple[str, ...]]] = [
            ("audio.input", sent, ("noise_reduction",)),
            ("audio.output", self.audio and self.audio.output, ("voice", "speed")),
            ("audio.input.turn_detection", sent and sent.turn_detection, TurnDetection.TUNING),
        ]
        for path, part, fields in parts:
            asked |= {f"{path}.{name}": getattr(part, name) for name in fields if part}
        if sent and sent.turn_detection and sent.turn_detection.interrupt_response is False:
            asked["audio.input.turn_detection.interrupt_response"] = True
        return {name for name, value in asked.items() if value}


def check_tools(tools: list[dict[str, Any]] | None, path: str) -> None:
    """Refuses what is no tool. Tools are taken: a model may call those that it is given, and this one never does."""
    for i, tool in enumerate(tools or ()):
        for name in ("type", "name") if tool.get("type") == "function" else ("type",):
            if not isinstance(tool.get(name), str):
                field = f"{path}[{i}].{name}"
                text = f"{field}: is missing, or no text; and this model calls no tools"
                raise Refusal(text, "missing_required_parameter", field)


def check_tool_choice(choice: str | dict[str, Any] | None, path: str) -> None:
    """Refuses to be made to call a tool: the model calls none."""
    if choice not in (None, "auto", "none"):
        raise Refusal(f'{path}: this model calls no tools; "auto" or "none"', param=path)


class SessionUpdate(Incoming):
    """`session.update`."""

    type: str
    event_id: str | None = None
    session: dict[str, Any]


class Part(Incoming):
    """A part of a message."""

    type: str | None = None
    text: str | None = None
    transcript: str | None = None
    audio: str | None = None
    image_url: str | None = None
    detail: str | None = None


class Item(Incoming):
    """An item of the conversation."""

    type: str
    id: Id | None = None
    object: Any = None
    status: Any = None
    role: Literal["user", "assistant", "system"] | None = None
    content: Annotated[list[Part], Field(max_length=128)] | None = None
    call_id: Any = None
    name: Any = None
    arguments: Any = None
    output: Any = None

    def text(self) -> str:
        """The words of a message.

        Raises:
            Refusal: it is no message, or one of anything but words.
        """
        if self.type != "message":
            text = f"item.type: {self.type!r}; this server takes messages and function_call_output"
            raise Refusal(text, param="item.type")
        if self.role is None:
            raise Refusal("item.role: is missing", "missing_required_parameter", "item.role")
        if self.content is None:
            raise Refusal("item.content: is missing", "missing_required_parameter", "item.content")
        kinds = {"assistant": ("output_text", "output_audio", "text")}.get(self.role, ("input_text",))
        texts = []
        for i, part in enumerate(self.content):
            path = f"item.content[{i}]"
            if part.type not in kinds:
                made = f"a message of the {self.role} is made of {', '.join(kinds)}"
                text = f"{path}.type: is {part.type!r}; {made}, and sound goes into input_audio_buffer"
                raise Refusal(text, param=f"{path}.type")
            name = "transcript" if part.type == "output_audio" else "text"
            words = getattr(part, name)
            if words is None:
                raise Refusal(f"{path}.{name}: is missing", "missing_required_parameter", f"{path}.{name}")
            texts.append(words)
        text = " ".join(texts)
        if not text.strip():
            raise Refusal("item.content: holds no words", param="item.content")
        return text


class ItemCreate(Incoming):
    """`conversation.item.create`."""

    type: str
    event_id: str | None = None
    previous_item_id: str | None = None
    item: Item


class ItemTruncate(Incoming):
    """`conversation.item.truncate`."""

    type: str = "conversation.item.truncate"
    event_id: str | None = None
    item_id: str
    content_index: int = 0
    audio_end_ms: int = Field(ge=0)


class ItemOf(Incoming):
    """`conversation.item.retrieve` and `conversation.item.delete`."""

    type: str
    event_id: str | None = None
    item_id: str


class TextAppend(Incoming):
    """`duplex.text.append`."""

    type: str
    event_id: str | None = None
    text: str


class AudioAppend(Incoming):
    """`input_audio_buffer.append`."""

    type: str
    event_id: str | None = None
    audio: str


class Plain(Incoming):
    """An event that is its type alone."""

    type: str
    event_id: str | None = None


class ResponseCancel(Incoming):
    """`response.cancel`."""

    type: str
    event_id: str | None = None
    response_id: str | None = None


class ResponseBody(Incoming):
    """How a response is to be made."""

    conversation: str | None = None
    instructions: str | None = None
    max_output_tokens: MostTokens = None
    metadata: dict[str, str] | None = None
    output_modalities: list[str] | None = None
    audio: AudioConfig | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    input: Any = None
    parallel_tool_calls: Any = None
    prompt: Any = None
    reasoning: Any = None

    def check(self, modalities: list[str]) -> None:
        """Refuses what cannot be done for one response alone.

        Args:
            modalities: the session's.
        """
        if self.conversation not in (None, "auto"):
            path = "response.conversation"
            raise Refusal(f'{path}: is {self.conversation[:40]!r}; a duplex session has one, "auto"', param=path)
        if self.output_modalities not in (None, modalities):
            path = "response.output_modalities"
            raise Refusal(f"{path}: this session's are {modalities}; session.update sets them", param=path)
        for name in ("input", "prompt", "reasoning"):
            if getattr(self, name) is not None:
                path = f"response.{name}"
                raise Refusal(f"{path}: is not supported; a response answers the conversation", param=path)
        check_tools(self.tools, "response.tools")
        check_tool_choice(self.tool_choice, "response.tool_choice")
        output = self.audio and self.audio.output
        if output and output.format:
            output.format.check("response.audio.output.format")
        metadata = self.metadata or {}
        if len(metadata) > 16 or any(len(k) > 64 or len(v) > 512 for k, v in metadata.items()):
            path = "response.metadata"
            raise Refusal(f"{path}: at most 16 pairs, of 64 characters a name and 512 a value", param=path)


class ResponseCreate(Incoming):
    """`response.create`."""

    type: str
    event_id: str | None = None
    response: ResponseBody | None = None
