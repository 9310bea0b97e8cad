"""Flags of jobs that use an OpenAI-compatible API, and the client built from them."""

import contextlib
from typing import Any

from absl import flags

from duplex_jax.errors import UserError
from duplex_jax.llm.cache import ReplyCache
from duplex_jax.llm.client import Budget, Client
from launch import app


class RequestFlags:
    """Defines the flags for a job's module.

    Args:
        module: the job's `__name__`; --help lists the flags under it.
        url: name of the flag for the API's address.
        unusable: why a reply may be requested again, for --help.
        cache: default place of the replies, for --help.
    """

    def __init__(self, module: str, url: str, unusable: str, cache: str):
        here: dict[str, Any] = {"module_name": module}
        self._name = url
        self.url = flags.DEFINE_string(
            url,
            "https://api.openai.com/v1",
            "Base URL of an OpenAI-compatible API; the key is read from OPENAI_API_KEY.",
            **here,
        )
        self.concurrency = flags.DEFINE_integer(
            "concurrency", 16, "Maximum number of requests in flight.", lower_bound=1, **here
        )
        self._timeout = flags.DEFINE_float(
            "request_timeout", 120.0, "Timeout of one request in seconds.", lower_bound=0.1, **here
        )
        self._retries = flags.DEFINE_integer(
            "retries", 6, "Number of times to retry a request that got no reply.", lower_bound=0, **here
        )
        self.attempts = flags.DEFINE_integer("attempts", 3, unusable, lower_bound=1, **here)
        self.cache = app.path_flag("cache", None, f"File that stores the replies; {cache} by default.", **here)
        self._tokens = flags.DEFINE_integer(
            "budget_tokens", 0, "Maximum number of tokens for all replies in the cache; 0 means no limit.", **here
        )
        self._dollars = flags.DEFINE_float(
            "budget_dollars", 0.0, "Maximum cost of all replies in dollars; needs the prices; 0 means no limit.", **here
        )
        self._price_in = flags.DEFINE_float(
            "price_in", 0.0, "Price of a million prompt tokens in dollars.", lower_bound=0.0, **here
        )
        self._price_out = flags.DEFINE_float(
            "price_out", 0.0, "Price of a million completion tokens in dollars.", lower_bound=0.0, **here
        )

    def check(self) -> None:
        """Checks that a budget in dollars comes with prices.

        Raises:
            UserError: it does not.
        """
        if self._dollars.value and not (self._price_in.value or self._price_out.value):
            raise UserError("--budget_dollars needs --price_in and --price_out, dollars for a million tokens")

    def client(self, cache: ReplyCache, stack: contextlib.ExitStack) -> Client:
        """A client that stores replies in `cache` and is closed with `stack`."""
        budget = Budget(self._tokens.value, self._dollars.value, self._price_in.value, self._price_out.value)
        client = Client(
            self.url.value, cache, self.concurrency.value, self._timeout.value, self.attempts.value,
            self._retries.value, budget=budget, flag=f"--{self._name}",
        )  # fmt: skip
        # Replies in flight are paid for, so they are waited for, except after Ctrl-C.
        stack.push(lambda kind, *_: client.close(keep_waiting=kind is None))
        return client
