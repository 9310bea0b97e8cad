"""The study's server: one page, its requests, and the two systems, without revealing which is which."""

import asyncio
import collections
import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any

from aiohttp import hdrs, web

from duplex_jax.errors import UserError
from duplex_jax.evaluate.study.plan import ASPECTS, HIGH, LOW, MOST_COMMENT, SCALE, Texts, check_scores, plan_of
from duplex_jax.evaluate.study.store import OutOfOrder, Scores, Store, UnknownCode
from duplex_jax.evaluate.study.talk import Talk
from duplex_jax.serve.access import Access, Gate, Handler
from duplex_jax.serve.app import page_file
from duplex_jax.serve.connection import Caller, Connection, Sockets, WireLimits
from duplex_jax.serve.incoming import as_object
from duplex_jax.serve.sessions import Sessions
from duplex_jax.serve.settings import Settings
from duplex_jax.timeline import whole_characters

CODE = "Study-Code"
"""The header with a participant's code."""


@dataclasses.dataclass(frozen=True)
class System:
    """One of the two compared systems: its sessions and their settings."""

    sessions: Sessions
    settings: Settings


class StudyServer:
    """A study behind one port.

    Args:
        store: stores everything.
        systems: the systems `a` and `b` by name.
        texts: what participants read; there is one session with each system per opening.
        access: who may connect.
        grace: seconds that a conversation continues without its page; then it is abandoned and has to begin again.
        per_hour: most new participants per address and hour.
    """

    def __init__(
        self, store: Store, systems: Mapping[str, System], texts: Texts, *, access: Access | None = None,
        grace: float = 60.0, per_hour: int = 60,
    ):  # fmt: skip
        self.store, self.systems, self.texts = store, systems, texts
        self.access, self.grace, self.per_hour = access or Access(), grace, per_hour
        self.sockets = Sockets(WireLimits())
        self._talks: dict[int, Talk] = {}
        self._admitted: collections.deque[tuple[float, str]] = collections.deque()  # when, and from where

    def app(self) -> web.Application:
        """The application, to be run by aiohttp."""
        wire = self.sockets.limits
        app = web.Application(client_max_size=wire.message_bytes)
        Gate(self.access, wire, lambda request: not request.path.startswith("/api/"), _problem).apply_to(app)
        app.middlewares.append(_errors)
        app.on_startup.append(self._begin)
        app.on_shutdown.append(self._drain)
        app.on_cleanup.append(self._end)
        app.add_routes(
            [
                web.get("/", self._page),
                web.get("/{folder:page|study}/{name}", self._page),
                web.get("/api/about", self._about),
                web.post("/api/begin", self._admit),
                web.get("/api/state", self._state),
                web.post("/api/scores", self._score),
                web.post("/api/confirm", self._confirm),
                web.post("/api/withdraw", self._withdraw),
                web.get("/api/talk", self._talk),
            ]
        )
        return app

    async def _begin(self, app: web.Application) -> None:
        for system in self.systems.values():
            system.sessions.start()
        self.sockets.start()

    async def _drain(self, app: web.Application) -> None:
        await self.sockets.close()

    async def _end(self, app: web.Application) -> None:
        for talk in list(self._talks.values()):
            await self._stop(talk, finished=False)
        for system in self.systems.values():
            await system.sessions.close()

    async def _page(self, request: web.Request) -> web.StreamResponse:
        return page_file(
            request, request.match_info.get("folder", "study"), request.match_info.get("name", "index.html")
        )

    # The participant.

    async def _about(self, request: web.Request) -> web.StreamResponse:
        """What the page shows to everybody."""
        return web.json_response(
            {"consent": self.texts.consent, "note": self.texts.note, "sessions": len(self.texts.openings),
             "aspects": ASPECTS, "low": LOW, "high": HIGH, "scale": SCALE, "most_comment": MOST_COMMENT}
        )  # fmt: skip

    async def _admit(self, request: web.Request) -> web.StreamResponse:
        if _field(as_object(await _text(request)), "consent", bool, False) is not True:
            raise OutOfOrder("nobody takes part, and nothing is stored, without consent")
        now, address = time.monotonic(), Caller.of(request).address
        while self._admitted and now - self._admitted[0][0] > 3600:
            self._admitted.popleft()
        if sum(of == address for _, of in self._admitted) >= self.per_hour:
            raise web.HTTPTooManyRequests(text=f"{self.per_hour} participants came from here within an hour; try later")
        self._admitted.append((now, address))
        number, code = self.store.admit()
        return web.json_response({"code": code} | self._state_of(number))

    def _number(self, request: web.Request) -> int:
        return self.store.number(request.headers.get(CODE, ""))

    def _state_of(self, number: int) -> dict[str, Any]:
        """A participant's progress, with labels but never system names."""
        plan, step = plan_of(number), self.store.step(number, len(self.texts.openings))
        scores = {
            plan.labels[system]: {"scores": dict(s.of), "comment": s.comment}
            for system, s in self.store.scores(number).items()
        }
        return {
            "step": step.kind, "model": step.system and plan.labels[step.system], "session": step.session,
            "opening": step.session and self.texts.openings[step.session - 1], "live": number in self._talks,
            "order": [plan.labels[system] for system in plan.order], "scores": scores,
        }  # fmt: skip

    async def _state(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self._state_of(self._number(request)))

    async def _score(self, request: web.Request) -> web.StreamResponse:
        number = self._number(request)
        message = as_object(await _text(request))
        plan, label = plan_of(number), _field(message, "model", str)
        if label not in plan.labels.values():
            raise UserError(f"model: {label[:40]!r} is neither of {', '.join(sorted(plan.labels.values()))}")
        comment = _field(message, "comment", str, "").strip()
        if len(comment) > MOST_COMMENT or not whole_characters(comment):
            raise UserError(f"comment: at most {MOST_COMMENT} whole characters")
        scores = Scores(check_scores(_field(message, "scores", dict)), comment)
        self.store.score(number, len(self.texts.openings), plan.system(label), scores)
        return web.json_response(self._state_of(number))

    async def _confirm(self, request: web.Request) -> web.StreamResponse:
        number = self._number(request)
        self.store.confirm(number, len(self.texts.openings))
        return web.json_response(self._state_of(number))

    async def _withdraw(self, request: web.Request) -> web.StreamResponse:
        number = self._number(request)
        self.store.withdraw(number)
        if talk := self._talks.get(number):
            await self._stop(talk, finished=False)
        return web.json_response({"withdrawn": True})

    # Conversations.

    async def _talk(self, request: web.Request) -> web.StreamResponse:
        return await self.sockets.accept(request, self._converse, ("duplex-jax",))

    async def _converse(self, connection: Connection) -> None:
        talk: Talk | None = None
        try:
            async for data in connection.messages():
                try:
                    message = as_object(data)
                    kind = _field(message, "type", str)
                    if kind == "start":
                        if talk is not None:
                            raise OutOfOrder("start: the conversation has begun")
                        talk = await self._join(self.store.number(_field(message, "code", str)), connection)
                        connection.caller.sessions = 1
                    elif talk is None or talk.connection is not connection:
                        raise OutOfOrder(f"{kind}: comes before the conversation, or behind its end")
                    elif kind == "text":
                        if talk.over:
                            raise OutOfOrder("this conversation is over; end it and go on")
                        talk.say(_field(message, "text", str))
                    elif kind == "end":
                        if not (talk.answered or talk.over):
                            raise OutOfOrder("say something of your own before you end the conversation")
                        await self._stop(talk, finished=True)
                        connection.send({"type": "ended"})
                    else:
                        raise UserError(f"type: {kind[:40]!r} is none of start, text and end")
                except UserError as e:
                    connection.send({"type": "error", "message": str(e)})
        finally:
            if talk is not None and talk.connection is connection:
                talk.connection = None
                talk.leaving = asyncio.create_task(self._leave(talk), name="leave")
            await connection.close()

    async def _join(self, number: int, connection: Connection) -> Talk:
        """The participant's current conversation, or a new one."""
        talk = self._talks.get(number)
        if talk is not None and talk.stopping:
            raise OutOfOrder("the last conversation is just ending; try again")
        if talk is not None:
            if talk.leaving is not None:
                talk.leaving.cancel()
                talk.leaving = None
            before, talk.connection = talk.connection, connection
            if before is not None:
                before.send({"type": "moved"})
                before.hang_up()
            if talk.entry is not None:
                self._started(talk)
            return talk
        step = self.store.step(number, len(self.texts.openings))
        if step.kind != "talk":
            raise OutOfOrder("there is no conversation to begin now; something else comes next")
        assert step.system is not None
        assert step.session is not None
        system = self.systems[step.system]
        settings = dataclasses.replace(system.settings, seed=number * len(self.texts.openings) + step.session)
        talk = Talk(number, step, self.texts.openings[step.session - 1], settings.slice_seconds, connection=connection)
        self._talks[number] = talk
        try:
            entry = await system.sessions.begin(
                Caller(f"participant {number}"), settings, talk.take,
                on_wait=lambda place: talk.tell({"type": "waiting", "place": place}),
            )  # fmt: skip
        except BaseException:
            self._talks.pop(number, None)
            raise
        if talk.stopping:  # withdrew while waiting for a row
            await system.sessions.end(entry)
            raise OutOfOrder("the conversation has ended")
        talk.begin(entry)
        self._started(talk)
        return talk

    def _started(self, talk: Talk) -> None:
        assert talk.step.system is not None
        label = plan_of(talk.number).labels[talk.step.system]
        talk.tell({"type": "started", "model": label, "session": talk.step.session, "log": talk.log})
        if talk.over:
            talk.tell({"type": "over"})

    async def _leave(self, talk: Talk) -> None:
        await asyncio.sleep(self.grace)
        talk.leaving = None
        await self._stop(talk, finished=False)

    async def _stop(self, talk: Talk, finished: bool) -> None:
        """Ends and stores a conversation; an unfinished one has to begin again later."""
        if talk.stopping:
            return
        talk.stopping = True
        connection, talk.connection = talk.connection, None
        if talk.leaving is not None:
            talk.leaving.cancel()
        try:
            if talk.entry is not None:
                assert talk.step.system is not None
                await self.systems[talk.step.system].sessions.end(talk.entry)
                kept = talk.kept(finished)
                if kept is not None:
                    with contextlib.suppress(UnknownCode):  # has withdrawn
                        self.store.add(talk.number, len(self.texts.openings), kept)
        finally:
            del self._talks[talk.number]
            if connection is not None and not finished:
                connection.hang_up()


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except UnknownCode as e:
        return _problem(404, str(e))
    except OutOfOrder as e:
        return _problem(409, str(e))
    except UserError as e:
        return _problem(400, str(e))


async def _text(request: web.Request) -> str:
    if request.content_type != "application/json":
        raise UserError(f"{hdrs.CONTENT_TYPE}: must be application/json")
    try:
        return await request.text()
    except (UnicodeDecodeError, LookupError) as e:
        raise UserError(f"the body is no text ({e}); send JSON in UTF-8") from e


def _problem(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)


def _field(message: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
    """A validated field of a message.

    Raises:
        UserError: it is missing without a default, or has the wrong type; the message names it.
    """
    if name not in message:
        if default is ...:
            raise UserError(f"{name}: is missing from {message.get('type', 'the message')!r}")
        return default
    value = message[name]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if float in kinds:
        kinds = (*kinds, int)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise UserError(f"{name}: is {json.dumps(value)[:40]}; must be {wanted}")
    return value
