"""A model for EleutherAI's lm-evaluation-harness, so that its whole catalogue of tasks runs: `--model duplex_jax`.

Importing this registers the model. Likelihoods are those of `benchmarks.likelihood`, answers those of the engine.
"""

import collections
import functools
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from duplex_jax.checkpoint.registry import LoadedModel, load_model
from duplex_jax.decode.engine import Engine
from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.evaluate import conversations
from duplex_jax.evaluate.behaviour_run import Records
from duplex_jax.evaluate.benchmarks.likelihood import Likelihoods, log_likelihoods, make_row
from duplex_jax.evaluate.benchmarks.questions import Item
from duplex_jax.evaluate.benchmarks.ways import WAYS, Continuation
from duplex_jax.evaluate.conversations import Asking, SingleTurn, Turn, answer_rows, ask_questions, make_engine
from duplex_jax.model.minicpm import MiniCPM
from duplex_jax.tokenizer import decode

TASKS = Path(__file__).with_name("tasks")
"""Folder of our own tasks, for the harness's `--include_path`."""
ALL_WAYS = tuple(dict.fromkeys([*WAYS, *conversations.WAYS]))
# Stands around a control token's name in a prompt that the chat template made: no text of a task holds it.
_MARK = "\0"
_MAX_TOKENS = 256


class LogLikelihood(float):
    """A continuation's log-likelihood, with what the harness has no place for.

    Attributes:
        words: the same given that each token is neither idle nor the end of a slice.
        too_long: whether the beginning was cut for it to fit the context.
    """

    words: float
    too_long: bool

    def __new__(cls, value: float, words: float, too_long: bool) -> "LogLikelihood":
        made = super().__new__(cls, value)
        made.words, made.too_long = words, too_long
        return made


class Said(str):
    """An answer, with what became of it in `about`: see `conversations.Answer`."""

    about: conversations.Answer

    def __new__(cls, text: str, about: conversations.Answer) -> "Said":
        made = super().__new__(cls, text)
        made.about = about
        return made


class _Wanted(NamedTuple):
    """What a request for words asks for."""

    number: int
    question: SingleTurn
    task: str
    asking: Asking


@register_model("duplex_jax")
class DuplexLM(LM):  # type: ignore[misc, unused-ignore]
    """A model as the harness asks it.

    Args:
        model: as `load_model` takes it, or a loaded one.
        way: `plain`, the harness's prompt as it is; `turn_based`, the prompt as the user's message in the family's
            chat template; `duplex`, the prompt in slices of 4-6 words; `duplex_whole`, in one slice, for answers only.
            All but the first take a continuation without the white space in front of it: the assistant begins to
            speak there.
        rows: answers that are written at once.
        dtype: of the weights; float32 on CPU and bfloat16 elsewhere by default.
        capacity: most tokens of a context; 4096, or what the model has. What is longer loses its beginning, as the
            harness's own models do it; but a question that is too long to be answered by turns or in slices gets an
            empty answer.
        template: how slices become tokens, by name.
        seed: of the random draws.
        log: folder that keeps what was found for each item of each task, `TASK/WAY.jsonl` and
            `TASK/WAY.answers.jsonl`; what is there is not asked again. Empty keeps nothing.
        batch_size, max_batch_size, device: the harness gives these to every model. Likelihoods are batched by length
            and JAX has its own devices, so they mean nothing here.

    Raises:
        UserError: an argument that makes no sense, or a model that cannot be loaded.
    """

    def __init__(
        self,
        model: str | LoadedModel = "",
        way: str = "plain",
        rows: int = 8,
        dtype: str = "auto",
        capacity: int = 0,
        template: str | None = None,
        seed: int = 0,
        log: str | Path = "",
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown or not model:
            raise UserError(f"--model_args={','.join(unknown)}: must be model=M, and any of way, rows, dtype, "
                            "capacity, template, seed and log, with commas between them")  # fmt: skip
        if way not in ALL_WAYS:
            raise UserError(f"way={way}: is unknown; one of {', '.join(ALL_WAYS)}")
        if not isinstance(rows, int) or not isinstance(capacity, int) or rows < 1 or capacity < 0:
            raise UserError(f"rows={rows}, capacity={capacity}: must be whole numbers, rows 1 or more")
        loaded = model if isinstance(model, LoadedModel) else load_model(model, dtype=dtype, template=template)
        self.model, self.way, self._rows, self._seed, self._log = loaded, way, rows, seed, log
        self.capacity = capacity or min(4096, loaded.config.max_position_embeddings)
        names = map(re.escape, loaded.tokenizer.special)
        self._control = re.compile(f"{_MARK}({'|'.join(names)}){_MARK}")

    @property
    def tokenizer_name(self) -> str:
        """Tells prompts of one model and template from those of others, in the harness's cache of requests."""
        return f"{self.model.name}__{self.model.template.name}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's name; it is code and no text."""
        return self.model.template.name

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation in the family's chat template, up to the assistant's next word.

        Args:
            chat_history: `role` and `content` of each message.
            add_generation_prompt: the assistant begins a message; else it goes on with the last one, its own.

        Raises:
            UserError: the way brings a template of its own.
        """
        if self.way != "plain":
            raise UserError(f"way={self.way} puts the prompt into a template itself; --apply_chat_template goes with "
                            "way=plain")  # fmt: skip
        messages = [(m["role"], m["content"].replace(_MARK, "\ufffd")) for m in chat_history]
        begun = messages.pop()[1] if not add_generation_prompt and messages and messages[-1][0] == "assistant" else ""
        names = {i: name for name, i in self.model.tokenizer.special.items()}
        text = ""
        words: list[int] = []
        for token in self.model.template.turn_prompt(messages):
            if token in names:
                text += decode(self.model.tokenizer, words) + f"{_MARK}{names[token]}{_MARK}"
                words = []
            else:
                words.append(token)
        return text + decode(self.model.tokenizer, words) + begun

    # Text becomes tokens.

    def _encode(self, text: str) -> list[int]:
        """Ids of a prompt: control tokens where the chat template put them, and nowhere else."""
        tokenizer, ids = self.model.tokenizer, []
        # What the pattern captures stands at the odd places.
        for place, part in enumerate(self._control.split(text)):
            ids += [tokenizer.special[part]] if place % 2 else tokenizer.encode(part)
        return ids

    def _start(self, text: str) -> list[int]:
        """What stands in front of bare text; the chat template brings its own."""
        return [] if _MARK in text else self.model.template.start()

    @property
    def _prefix_id(self) -> int:
        """The token in front of text that has no context."""
        first = self.model.config.bos_token_id
        return self.model.template.end_id if first is None else first

    def _continuation(self, context: str, continuation: str, seed: str) -> tuple[Continuation, bool]:
        """The tokens of both, and whether the beginning had to go; `seed` draws the lengths of slices."""
        if self.way not in WAYS:
            raise UserError(f"way={self.way} is for answers; likelihoods take one of {', '.join(WAYS)}")
        if self.way != "plain" and context.strip():
            item = Item(context, (continuation.strip(),), 0)
            (found,) = WAYS[self.way](self.model.template, item, seed)
        else:
            found = self._text(context, continuation)
        if not found.scored:
            raise UserError(f"the continuation {continuation!r} has no token of its own behind {context[-40:]!r}")
        return self._cut(found), len(found.ids) > self.capacity

    def _text(self, context: str, continuation: str) -> Continuation:
        """One string is encoded and then cut, white space with what follows it, as the harness does it."""
        head = self._start(context)
        if context.strip():
            before = len(head) + len(self._encode(context.rstrip()))
        else:
            head = head or [self._prefix_id]
            before = len(head)
        ids = [*head, *self._encode(context + continuation)]
        return Continuation(ids, list(range(before, len(ids))))

    def _cut(self, continuation: Continuation) -> Continuation:
        """The continuation without its beginning where it is too long; its last token is never fed."""
        over = max(0, len(continuation.ids) - 1 - self.capacity)
        return Continuation(continuation.ids[over:], [i - over for i in continuation.scored if i > over])

    # Likelihoods.

    @functools.cached_property
    def _on_device(self) -> MiniCPM:
        return jax.tree.map(jnp.asarray, self.model.model)

    def _records(self, task: str, kind: str) -> Records:
        """What is kept of one of our own tasks; of others nothing is."""
        return Records(Path(self._log) / task / f"{self.way}.{kind}" if self._log and task else None)

    def _scores(
        self, questions: Sequence[Sequence[Continuation]], quiet: bool, done: Callable[[int, Likelihoods], None]
    ) -> None:
        """Tells `done` of each question's log-likelihoods, and whether greedy decoding would say each continuation."""
        rows = [make_row(continuations) for continuations in questions]
        if rows:
            of = log_likelihoods(self._on_device, rows, self.model.template.stop_ids, self.capacity)
            for number, found in _shown(of, len(rows), quiet, "questions by likelihood"):
                done(number, found)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """By request, (context, continuation), the log-likelihood, a `LogLikelihood`, and whether greedy decoding
        would say it."""
        # Continuations of one context are one row; equal ones are asked once.
        places: dict[Any, dict[str, int]] = collections.defaultdict(dict)
        names = [(*_name(request), request.args[0]) for request in requests]
        for name, request in zip(names, requests, strict=True):
            places[name].setdefault(request.args[1], len(places[name]))
        records = {task: self._records(task, "jsonl") for task in dict.fromkeys(name[0] for name in names)}
        # Items of our own tasks have a number; others are not kept.
        found: dict[Any, dict[str, Any]] = {
            name: records[name[0]].rows[name[1]] for name in places if name[1] in records[name[0]].rows
        }
        missing = [name for name in places if name not in found]
        asked = []
        cut = []
        for name in missing:
            task, number, context = name
            seed = context if number is None else f"{task}/{number}"
            pairs = [self._continuation(context, text, seed) for text in places[name]]
            asked.append([continuation for continuation, _ in pairs])
            cut.append(any(long for _, long in pairs))

        def done(place: int, scores: Likelihoods) -> None:
            name = missing[place]
            row = {"all": scores.all, "words": scores.words, "greedy": list(scores.greedy), "too_long": cut[place]}
            found[name] = row
            if name[1] is not None:
                records[name[0]].add(name[1], row)

        self._scores(asked, disable_tqdm, done)
        answers: list[tuple[float, bool]] = []
        for name, request in zip(names, requests, strict=True):
            row, place = found[name], places[name][request.args[1]]
            try:
                score = LogLikelihood(row["all"][place], row["words"][place], row["too_long"])
                answers.append((score, bool(row["greedy"][place])))
            except (KeyError, IndexError, TypeError) as e:
                raise UserError(f"{records[name[0]].path}: item {name[1]} lacks {e}; give a new --out") from None
            self.cache_hook.add_partial("loglikelihood", request.args, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """By request the log-likelihood of all its text, in windows as long as the context."""
        windows: list[list[Continuation]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            for pair in get_rolling_token_windows(self._encode(text), self._prefix_id, self.capacity, 1):
                context, said = make_disjoint_window(pair)
                windows.append([Continuation([*context, *said], list(range(len(context), len(context) + len(said))))])
                owners.append(number)
        found = [0.0] * len(requests)

        def done(place: int, scores: Likelihoods) -> None:
            found[owners[place]] += scores.all[0]

        self._scores(windows, disable_tqdm, done)
        for request, score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return found

    # Answers.

    @functools.cached_property
    def _engine(self) -> Engine:
        model = self.model
        return make_engine(model, self._rows, self.capacity, model.model.dtype)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """By request, (context, settings), what the model goes on with, up to the first of the stop texts: a `Said`."""
        used: dict[Any, int] = collections.Counter()
        wanted = [self._wanted(place, request, used) for place, request in enumerate(requests)]
        # Those that are asked alike, several at once.
        alike: dict[tuple[str, Asking], list[_Wanted]] = collections.defaultdict(list)
        for w in wanted:
            alike[w.task, w.asking].append(w)
        records = {task: self._records(task, "answers.jsonl") for task, _ in alike}
        way = conversations.PLAIN if self.way == "plain" else self.way
        with _bar(len(wanted), disable_tqdm, "answers") as bar:
            for (task, asking), group in alike.items():
                questions = {w.number: w.question for w in group}
                ask_questions(lambda: self._engine, task, questions, list(questions), way, asking, records[task],
                              lambda tokens: bar.update())  # fmt: skip
        answers: list[str] = []
        for w, request in zip(wanted, requests, strict=True):
            (about,) = answer_rows(w.question, records[w.task], w.number)
            assert about is not None
            text = postprocess_generated_text(about["answer"], list(w.asking.until), None)
            answers.append(Said(text, about))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _wanted(self, place: int, request: Any, used: dict[Any, int]) -> _Wanted:
        """A request for words as the harness's own models read it: greedy unless it asks for samples."""
        context, settings = request.args
        kwargs: Any = normalize_gen_kwargs(dict(settings), _MAX_TOKENS)
        temperature = float(kwargs.get("temperature") or 0.0) if kwargs["do_sample"] else 0.0
        sampling = Sampling(temperature, float(kwargs.get("top_p", 1.0)), int(kwargs.get("top_k", 0)))
        until = tuple(s for s in kwargs["until"] if s)
        asking = Asking(sampling, self._seed, kwargs["max_gen_toks"], until=until)
        task, number = _name(request)
        name = f"{zlib.crc32(context.encode()):08x}" if number is None else str(number)
        # One question several times: each has a name, and draws, of its own.
        if again := used[task, name]:
            name = f"{name}/{again}"
        used[task, name.partition("/")[0]] += 1
        number = place if number is None or again else number
        ids = self._prompt(context, asking.max_tokens) if self.way == "plain" else ()
        return _Wanted(number, SingleTurn(name, (Turn(context),), tuple(ids)), task, asking)

    def _prompt(self, context: str, max_tokens: int) -> list[int]:
        ids = [*self._start(context), *self._encode(context)] or [self._prefix_id]
        room = self.capacity - max_tokens - self._engine.max_slice_tokens
        if room < 1:
            raise UserError(f"max_gen_toks={max_tokens} leaves no room for a prompt in a context of "
                            f"{self.capacity} tokens; give a larger capacity")  # fmt: skip
        return ids[-room:]


def _name(request: Any) -> tuple[str, int | None]:
    """Task and number of an item of our own tasks; an empty text and None of others."""
    doc = request.doc or {}
    return (doc["task"], doc["number"]) if "task" in doc and "number" in doc else ("", None)


def _bar(total: int, quiet: bool, what: str) -> Any:
    """Progress: a bar on a terminal, now and then a line elsewhere."""
    return tqdm(total=total, disable=quiet, desc=what, mininterval=0.1 if sys.stderr.isatty() else 30)


def _shown(found: Iterable[Any], total: int, quiet: bool, what: str) -> Iterable[Any]:
    with _bar(total, quiet, what) as bar:
        for row in found:
            yield row
            bar.update()
