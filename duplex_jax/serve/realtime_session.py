"""What a Realtime session is set to, and how `session.update` changes it."""

from collections.abc import Mapping
from typing import Any

from duplex_jax.serve import realtime_messages as messages
from duplex_jax.serve.calls import chat_tool_choice, chat_tools
from duplex_jax.serve.incoming import Refusal, read
from duplex_jax.serve.realtime_items import new_id
from duplex_jax.serve.realtime_messages import RATE
from duplex_jax.serve.settings import Settings


class SessionOptions:
    """The session as the protocol shows it.

    Args:
        model: the name of the server's model.
        slice_seconds: k where the client does not say.
        speaks: whether the server has speech.
        calls: whether it has a mind, which may call functions.
    """

    def __init__(self, model: str, slice_seconds: float, speaks: bool, calls: bool = False):
        self._speaks, self._calls = speaks, calls
        sound = {"format": {"type": "audio/pcm", "rate": RATE}}
        self.shown: dict[str, Any] = {
            "type": "realtime",
            "object": "realtime.session",
            "id": new_id("sess"),
            "model": model,
            "instructions": "",
            "output_modalities": ["audio" if speaks else "text"],
            "tools": [],
            "tool_choice": "auto" if calls else "none",
            "max_output_tokens": "inf",
            "audio": {
                "input": sound | {"turn_detection": {"type": "server_vad"}},
                "output": sound | {"voice": "default"},
            },
            "duplex": {"slice_seconds": slice_seconds, "slices": False},
        }
        """The session object of the protocol; `duplex.unsupported` names what was asked for and is not done."""
        self.notes: dict[str, str] = {}
        """What system items say, by their ids."""

    @property
    def spoken(self) -> bool:
        """Whether the assistant speaks; else it writes."""
        return self.shown["output_modalities"] == ["audio"]

    @property
    def detects_turns(self) -> bool:
        """Whether the client is told where the user's speech begins and ends."""
        return self.shown["audio"]["input"]["turn_detection"] is not None

    @property
    def waits(self) -> bool:
        """Whether the client says itself when the model is to speak."""
        return not self.detects_turns or self.shown["audio"]["input"]["turn_detection"].get("create_response") is False

    def instructions(self, instructions: str | None = None) -> str:
        """The system prompt: the session's instructions, or others, and what system items say."""
        base = self.shown["instructions"] if instructions is None else instructions
        return "\n\n".join(filter(None, (base, *self.notes.values())))

    def tools(self) -> dict[str, Any]:
        """The functions that the mind may call, as fields of a `Delegation`."""
        if not self._calls:
            return {}
        return {
            "tools": chat_tools(self.shown["tools"], "session.tools"),
            "tool_choice": chat_tool_choice(self.shown["tool_choice"], "session.tool_choice"),
        }

    def settings(self) -> Settings:
        """What a session is begun with."""
        options = {k: v for k, v in self.shown["duplex"].items() if k != "unsupported"}
        return messages.DuplexOptions(**options).settings(self.instructions())

    def changed(self, given: Mapping[str, Any], began: bool) -> dict[str, Any]:
        """The session object after an update.

        Args:
            given: `session` of the update.
            began: the conversation has begun.

        Raises:
            UserError: a field that is unknown, of another type, or asks for what cannot be done; names it.
        """
        for name in given.keys() & messages.BETA.keys():
            now = f"session.{messages.BETA[name]}"
            text = f"session.{name}: is a field of the protocol's beta; send {now}"
            raise Refusal(text, "unknown_parameter", f"session.{name}")
        asked, old = read(messages.Session, given, "session"), self.shown
        if asked.type not in (None, "realtime"):
            raise Refusal(f"session.type: is {asked.type[:40]!r}; must be realtime", param="session.type")
        if asked.model not in (None, old["model"]):
            text = f"session.model: {asked.model[:80]!r} does not exist; this server has {old['model']!r}"
            raise Refusal(text, "model_not_found", "session.model")
        if self._calls:
            chat_tools(asked.tools, "session.tools")
            chat_tool_choice(asked.tool_choice, "session.tool_choice")
        else:
            messages.check_tools(asked.tools, "session.tools")
            messages.check_tool_choice(asked.tool_choice, "session.tool_choice")
        new = old | {"audio": self._audio(asked.audio), "duplex": self._duplex(asked, began)}
        if asked.output_modalities is not None:
            new["output_modalities"] = self._modalities(asked.output_modalities, began)
        for name in ("tools", "tool_choice"):
            if self._calls and getattr(asked, name) is not None:
                new[name] = getattr(asked, name)
        if asked.max_output_tokens is not None:
            new["max_output_tokens"] = asked.max_output_tokens
        if "instructions" in asked.model_fields_set:
            new["instructions"] = asked.instructions or ""
        return new

    def _modalities(self, asked: list[str], began: bool) -> list[str]:
        path = "session.output_modalities"
        if asked not in (["text"], ["audio"]):
            raise Refusal(f'{path}: must be ["text"] or ["audio"]', param=path)
        if asked == ["audio"] and not self._speaks:
            raise Refusal(f"{path}: this server has no speech; start it with --voice", param=path)
        if began and asked != self.shown["output_modalities"]:
            raise Refusal(f"{path}: can be set before the conversation has begun, not after", param=path)
        return asked

    def _audio(self, asked: messages.AudioConfig | None) -> dict[str, Any]:
        audio = dict(self.shown["audio"])
        for side in ("input", "output"):
            part = getattr(asked, side, None)
            if part and part.format:
                part.format.check(f"session.audio.{side}.format")
        given = asked and asked.input
        if given and "turn_detection" in given.model_fields_set:
            detection = given.turn_detection
            fields = {"type", "create_response"}
            shown = detection and detection.model_dump(include=fields, exclude_none=True)
            audio["input"] = audio["input"] | {"turn_detection": shown}
        return audio

    def _duplex(self, asked: messages.Session, began: bool) -> dict[str, Any]:
        old = self.shown["duplex"]
        given = asked.duplex.model_dump(exclude_unset=True, exclude={"unsupported"}) if asked.duplex else {}
        new = old | given
        options = {k: v for k, v in new.items() if k != "unsupported"}
        messages.DuplexOptions(**options).settings("")  # says what is wrong with it
        if began and any(new[k] != old.get(k) for k in given if k != "slices"):
            text = "session.duplex: can be set before the conversation has begun, not after"
            raise Refusal(text, param="session.duplex")
        unsupported = (asked.unsupported() - ({"tools"} if self._calls else set())) | set(old.get("unsupported", ()))
        return new | ({"unsupported": sorted(unsupported)} if unsupported else {})
