"""Client of OpenAI-compatible servers: concurrent requests, back-off, budgets, and a cache of all replies."""

import asyncio
import collections
import dataclasses
import json
import logging
import os
import random
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from duplex_jax.errors import UserError, extra
from duplex_jax.llm.cache import ERROR, Answer, Question, Reply, ReplyCache, settle

# After this many consecutive requests that failed all their retries, the server is considered gone.
GIVE_UP_AFTER = 20
_LONGEST_WAIT = 60.0


class Stopped(Exception):
    """The run ends early but cleanly: a budget is used up or the server is gone; the message says which."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits on the total cost of a cache's replies, over all runs; 0 sets no limit. Prices are per million tokens."""

    tokens: int = 0
    dollars: float = 0.0
    price_in: float = 0.0
    price_out: float = 0.0

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The cost in dollars."""
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6


@dataclasses.dataclass
class Report:
    """Counts of a client's requests and replies.

    Attributes:
        sent: HTTP requests.
        cached: questions answered from the cache alone.
        answered: questions with a usable answer.
        retried: HTTP requests that were repeated, by cause.
        rejected: unusable replies that led to another attempt, by fault.
        left_out: questions without a usable answer, by the last fault.
        unanswered: questions to which the server never replied, by the last cause.
        prompt_tokens: prompt tokens of all replies in the cache.
        completion_tokens: completion tokens of all replies in the cache.
        dollars: their cost at the given prices.
    """

    sent: int = 0
    cached: int = 0
    answered: int = 0
    retried: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    rejected: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    unanswered: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {k: dict(v) if isinstance(v, collections.Counter) else v for k, v in vars(self).items()}

    def lines(self, who: str = "rewriter") -> list[str]:
        """The report as text for a terminal."""
        found = [
            f"{who}: {self.sent:,} requests sent, {self.answered:,} usable answers "
            f"({self.cached:,} questions were settled by the cache)"
        ]
        for text, counts in (
            ("sent again after", self.retried),
            ("asked again after", self.rejected),
            ("left out for", self.left_out),
            ("never answered", self.unanswered),
        ):
            if counts:
                found.append(f"{who}: {text} " + ", ".join(f"{k} x {n:,}" for k, n in counts.most_common()))
        cost = f", ${self.dollars:.4f}" if self.dollars else ""
        found.append(
            f"{who}: {self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens are in the "
            f"cache{cost}"
        )
        return found


class Client:
    """Answers requests from the cache or the server, on its own thread.

    Args:
        base_url: address of the API, such as http://localhost:8000/v1. The key comes from OPENAI_API_KEY.
        cache: stores every reply.
        concurrency: maximum number of requests in flight.
        timeout: seconds allowed for one request.
        attempts: unusable replies after which a question is left out.
        retries: how often a request without a reply is repeated.
        backoff: seconds before the first retry; doubled each time.
        budget: limits on the cost.
        flag: the flag that gave the address, for error messages.

    Raises:
        UserError: the package `openai` is not installed.
    """

    def __init__(
        self,
        base_url: str | None,
        cache: ReplyCache,
        concurrency: int = 16,
        timeout: float = 120.0,
        attempts: int = 3,
        retries: int = 6,
        backoff: float = 0.5,
        budget: Budget | None = None,
        flag: str = "--base_url",
    ):
        self.flag = flag
        self.base_url = base_url or "https://api.openai.com/v1"
        self.cache, self.budget = cache, budget or Budget()
        self.concurrency, self.timeout, self.attempts = concurrency, timeout, attempts
        self.retries, self.backoff = retries, backoff
        self.report = Report()
        self.report.prompt_tokens, self.report.completion_tokens = cache.spent()
        self._reserved: dict[int, tuple[int, int]] = {}
        self._stopped = ""
        self._in_a_row = 0
        self._replies = 0
        self._quiet_until = 0.0
        self._flying: dict[str, asyncio.Task[Answer | None]] = {}
        self._jitter = random.Random()
        # Created here, not on the loop's thread, so that the caller gets the error about a missing package.
        self._api = make_api(self.base_url, timeout, asynchronous=True)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self._thread.start()
        self._ready.wait()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._slots = asyncio.Semaphore(self.concurrency)
        self._released = asyncio.Event()
        self._ready.set()
        self._loop.run_forever()

    def answer(self, requests: Sequence[Question]) -> "Future[dict[str, Answer] | None]":
        """Answers by key, as a future; its result is None if the server never replied to one of the requests."""
        return asyncio.run_coroutine_threadsafe(self._answer_all(requests), self._loop)

    async def _answer_all(self, requests: Sequence[Question]) -> dict[str, Answer] | None:
        tasks = []
        for request in requests:
            if request.key not in self._flying:  # identical questions share one request
                task = self._loop.create_task(self._settle(request))
                self._flying[request.key] = task
            tasks.append(self._flying[request.key])
        # Waits for all, even if one fails, so that replies in flight are kept.
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        answers = {r.key: a for r, a in zip(requests, results, strict=True) if isinstance(a, Answer)}
        return answers if len(answers) == len(requests) else None

    async def _settle(self, request: Question) -> Answer | None:
        try:
            return await self._ask(request)
        finally:
            del self._flying[request.key]

    async def _ask(self, request: Question) -> Answer | None:
        replies = self.cache.replies(request.key)
        known = len(replies)
        while (answer := settle(request, replies, self.attempts)) is None:
            async with self._slots:
                reply = await self._send(request, len(replies))
            if reply is None:
                return None
            self.cache.put(request.key, len(replies), reply)
            replies.append(reply)
            _, found = request.read(reply.text, reply.finish_reason)
            if found and not reply.finish_reason.startswith(ERROR):
                self.report.rejected[found] += 1
        self.report.cached += len(replies) == known
        if answer.text is None:
            self.report.left_out[answer.reason] += 1
        else:
            self.report.answered += 1
        return answer

    async def _send(self, request: Question, attempt: int) -> Reply | None:
        """Sends a request, with retries; None if there was no reply."""
        import openai

        body = request.body(attempt)
        cause = ""
        for retry in range(self.retries + 1):
            await self._wait_turn()
            await self._reserve(request)
            self.report.sent += 1
            wait = self.backoff * 2**retry * self._jitter.uniform(0.5, 1.5)
            try:
                async with asyncio.timeout(self.timeout):
                    completion = await self._api.chat.completions.create(**body)
                reply = read_reply(completion.model_dump(), "".join(text for _, text in request.messages))
                self._spend(reply)
                self._in_a_row = 0
                self._replies += 1
                return reply
            except (TimeoutError, openai.APITimeoutError):
                cause = "time-out"
            except openai.APIConnectionError as e:
                cause = "connection lost"
                if not self._replies and retry == min(3, self.retries):
                    self._stopped = "the server cannot be reached"
                    raise UserError(
                        f"{self.flag}={self.base_url}: cannot be reached ({e.__cause__ or e}); start the server"
                    ) from e
            except openai.APIStatusError as e:
                cause = f"HTTP {e.status_code}"
                if e.status_code in (401, 403, 404):
                    self._stopped = cause
                    raise UserError(_refused(f"{self.flag}={self.base_url}", body["model"], e.status_code)) from e
                if e.status_code not in (408, 409, 429) and e.status_code < 500:
                    return Reply("", ERROR + cause, 0, 0)
                wait = max(wait, _retry_after(e.response.headers.get("retry-after")))
                if e.status_code == 429:  # all requests must slow down
                    self._quiet_until = max(self._quiet_until, self._loop.time() + wait)
            except (ValueError, TypeError, AttributeError, openai.OpenAIError):
                cause = "broken reply"
            finally:
                self._release()
            if retry < self.retries:
                self.report.retried[cause] += 1
                await asyncio.sleep(min(wait, _LONGEST_WAIT))
        self.report.unanswered[cause] += 1
        self._in_a_row += 1
        if self._in_a_row >= GIVE_UP_AFTER:
            self._stopped = f"{self._in_a_row} requests in a row got no reply (last: {cause})"
        return None

    async def _wait_turn(self) -> None:
        while (left := self._quiet_until - self._loop.time()) > 0 and not self._stopped:
            await asyncio.sleep(left)
        if self._stopped:
            raise Stopped(self._stopped)

    async def _reserve(self, request: Question) -> None:
        """Reserves the maximum cost of a request, so that requests in flight cannot exceed a budget together.

        If that does not fit the budget, waits for requests in flight, which usually cost less than was reserved.
        """
        most = sum(len(text.encode()) // 2 + 8 for _, text in request.messages), request.max_tokens
        while limits := self._exceeded(*most):
            if not self._reserved:
                self._stopped = f"the next request might exceed {' and '.join(limits)}"
            if self._stopped:
                raise Stopped(self._stopped)
            await self._released.wait()
        self._reserved[id(asyncio.current_task())] = most

    def _release(self) -> None:
        self._reserved.pop(id(asyncio.current_task()), None)
        self._released.set()
        self._released = asyncio.Event()

    def _exceeded(self, prompt: int, completion: int) -> list[str]:
        """The limits that this many more tokens could exceed."""
        prompt += self.report.prompt_tokens + sum(n for n, _ in self._reserved.values())
        completion += self.report.completion_tokens + sum(n for _, n in self._reserved.values())
        limits = []
        if self.budget.tokens and prompt + completion > self.budget.tokens:
            limits.append(f"--budget_tokens={self.budget.tokens:,}")
        if self.budget.dollars and self.budget.cost(prompt, completion) > self.budget.dollars:
            limits.append(f"--budget_dollars={self.budget.dollars:g}")
        return limits

    def _spend(self, reply: Reply) -> None:
        self.report.prompt_tokens += reply.prompt_tokens
        self.report.completion_tokens += reply.completion_tokens
        self.report.dollars = self.budget.cost(self.report.prompt_tokens, self.report.completion_tokens)

    def close(self, keep_waiting: bool = True) -> None:
        """Ends the thread, by default after waiting for replies in flight."""

        async def finish() -> None:
            self._stopped = self._stopped or "closing"
            tasks = list(self._flying.values())
            if not keep_waiting:
                for task in tasks:
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._api.close()

        asyncio.run_coroutine_threadsafe(finish(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def make_api(base_url: str, timeout: float, asynchronous: bool) -> Any:
    """The `openai` package's client, without its own retries: ours are counted and slow down together."""
    with extra("llm", "a language model server"):
        import openai

    # One log line per request would hide the progress display.
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Local servers need no key, but the package requires one.
    key = os.environ.get("OPENAI_API_KEY") or "none"
    kind = openai.AsyncOpenAI if asynchronous else openai.OpenAI
    return kind(base_url=base_url, api_key=key, timeout=timeout, max_retries=0)


def read_reply(completion: Any, prompt: str) -> Reply:
    """Converts a chat completion's JSON to a reply; estimates the usage if the server does not report it.

    Raises:
        ValueError: the JSON is not a chat completion.
    """
    try:
        choice = completion["choices"][0]
        text = choice["message"]["content"] or ""
        usage = completion.get("usage") or {}
        tokens = usage.get("prompt_tokens") or len(prompt.encode()) // 4
        return Reply(
            str(text), choice.get("finish_reason") or "", int(tokens),
            int(usage.get("completion_tokens") or len(str(text).encode()) // 4), str(completion.get("model") or ""),
        )  # fmt: skip
    except (KeyError, IndexError, TypeError, AttributeError) as e:
        raise ValueError(f"no chat completion ({json.dumps(completion, default=str)[:80]})") from e


def _refused(address: str, model: str, status: int) -> str:
    # The server's own message may quote the API key, so it is not shown.
    if status == 404:
        return f"{address}: HTTP 404; no such address (most end in /v1), or no model {model!r} there"
    return f"{address}: HTTP {status}; set OPENAI_API_KEY to a key that may use {model!r}"


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header; 0 if it has none or a date."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        return 0.0
