"""Asks a model through OpenAI's Batch API: writes request files, submits them, collects the replies.

    OUT/batch/<hash>.requests    one request per line
    OUT/batch/<hash>.batch.json  the batch created from them
    OUT/batch/<hash>.replies     its replies

Files that end in .jsonl in a data set's folder are timelines, so these have other endings. Some questions depend on
earlier answers, so the cycle of write, submit and collect repeats until nothing is left to ask.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from data_gen.rewriter import Request
from duplex_jax.errors import UserError
from duplex_jax.files import atomic_write
from duplex_jax.llm.cache import ERROR, Answer, Reply, ReplyCache, settle
from duplex_jax.llm.client import make_api, read_reply

# OpenAI's limits per file.
MAX_REQUESTS = 50_000
MAX_BYTES = 190_000_000


class BatchWriter:
    """Answers from the cache; requests without an answer there are recorded, to be asked later."""

    def __init__(self, cache: ReplyCache, attempts: int = 3):
        self.cache, self.attempts = cache, attempts
        self.waiting: dict[str, dict[str, Any]] = {}

    def answer(self, requests: Sequence[Request]) -> "Future[dict[str, Answer] | None]":
        answers: dict[str, Answer] = {}
        for request in requests:
            replies = self.cache.replies(request.key)
            answer = settle(request, replies, self.attempts)
            if answer is not None:
                answers[request.key] = answer
                continue
            name = f"{request.key}-{len(replies)}"
            self.waiting[name] = {
                "custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": request.body(len(replies)),
            }  # fmt: skip
        future: Future[dict[str, Answer] | None] = Future()
        future.set_result(answers if len(answers) == len(requests) else None)
        return future

    def write(self, folder: Path) -> list[Path]:
        """Writes the recorded requests, replacing files that were not submitted; returns the new files."""
        for old in folder.glob("*.requests"):
            if not _note(old).exists():
                old.unlink()
        paths = []
        for lines in self._files():
            data = "".join(lines)
            path = folder / f"{hashlib.sha256(data.encode()).hexdigest()[:12]}.requests"
            with atomic_write(path) as f:
                f.write(data)
            paths.append(path)
        return paths

    def _files(self) -> Iterator[list[str]]:
        lines: list[str] = []
        size = 0
        for _, row in sorted(self.waiting.items()):
            line = json.dumps(row, ensure_ascii=False) + "\n"
            if lines and (len(lines) == MAX_REQUESTS or size + len(line.encode()) > MAX_BYTES):
                yield lines
                lines, size = [], 0
            lines.append(line)
            size += len(line.encode())
        if lines:
            yield lines


def _note(requests: Path) -> Path:
    return requests.with_suffix(".batch.json")


def _output(requests: Path) -> Path:
    return requests.with_suffix(".replies")


def submit(folder: Path, base_url: str, timeout: float = 600.0) -> list[str]:
    """Uploads every request file not yet submitted and starts its batch; returns the batches' ids.

    Raises:
        UserError: there is nothing to submit, or the server refuses.
    """
    api = make_api(base_url, timeout, asynchronous=False)
    import openai

    todo = [p for p in sorted(folder.glob("*.requests")) if not _note(p).exists()]
    if not todo:
        raise UserError(f"{folder}: has no unsent request file; --batch=write makes them")
    ids = []
    for path in todo:
        try:
            with open(path, "rb") as f:
                file = api.files.create(file=(f"{path.stem}.jsonl", f), purpose="batch")
            batch = api.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        except openai.OpenAIError as e:
            raise UserError(f"--base_url={base_url}: does not accept {path.name} ({type(e).__name__})") from e
        with atomic_write(_note(path)) as note:
            json.dump({"id": batch.id, "input_file_id": file.id}, note)
        ids.append(batch.id)
    return ids


def collect(folder: Path, base_url: str, cache: ReplyCache, timeout: float = 600.0) -> dict[str, int]:
    """Fetches finished batches and adds their replies to the cache.

    Replies obtained in other ways count too: any `<hash>.replies` in the folder.

    Returns:
        The number of replies read, and the number of batches in each state.

    Raises:
        UserError: the server refuses, or a reply file is invalid.
    """
    import openai

    api = make_api(base_url, timeout, asynchronous=False)
    counts: dict[str, int] = {"replies": 0}
    for path in sorted(folder.glob("*.requests")):
        if _note(path).exists() and not _output(path).exists():
            try:
                batch = api.batches.retrieve(json.loads(_note(path).read_text())["id"])
                counts[batch.status] = counts.get(batch.status, 0) + 1
                files = [batch.output_file_id, batch.error_file_id] if batch.status in _OVER else []
                parts = [api.files.content(f).read() for f in files if f]
            except openai.OpenAIError as e:
                raise UserError(f"--base_url={base_url}: no status of {path.name} ({type(e).__name__})") from e
            if parts:
                with atomic_write(_output(path), "wb") as f:
                    f.write(b"".join(parts))
            elif batch.status in _OVER:  # it ended without replies and can be submitted again
                _note(path).unlink()
        if _output(path).exists():
            counts["replies"] += _read_output(path, cache)
    return counts


_OVER = ("completed", "failed", "expired", "cancelled")


def _read_output(path: Path, cache: ReplyCache) -> int:
    bodies = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        bodies[row["custom_id"]] = row["body"]
    number = 0
    for n, line in enumerate(_output(path).read_text(encoding="utf-8").splitlines(), 1):
        where = f"{_output(path)}:{n}"
        try:
            row = json.loads(line)
            name, response = row["custom_id"], row.get("response") or {}
            prompt = "".join(m["content"] for m in bodies[name]["messages"])
            status = int(response.get("status_code") or 500)
            if status == 200:
                reply = read_reply(response["body"], prompt)
            elif status >= 500 or status in (408, 409, 429):
                continue  # nothing is known about it, so it is written again
            else:
                reply = Reply("", f"{ERROR}HTTP {status}", 0, 0)
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{where}: is not a reply to {path.name} ({e}); fetch the batch's output again") from e
        key, _, attempt = name.rpartition("-")
        cache.put(key, int(attempt), reply)
        number += 1
    return number
