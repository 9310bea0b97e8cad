"""A model for EleutherAI's lm-evaluation-harness, so that its whole catalogue of tasks runs: `--model duplex_jax`.

Importing this registers the model. Likelihoods are those of `benchmarks.likelihood`, answers those of the engine.
"""

import collections
import functools
import re
import tempfile
from collections.abc import Mapping, Sequence
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
from duplex_jax.decode.turns import TurnSession, step_turns
from duplex_jax.errors import UserError
from duplex_jax.evaluate.behaviour_run import Records
from duplex_jax.evaluate.benchmarks.likelihood import log_likelihoods, make_row
from duplex_jax.evaluate.benchmarks.tasks import Item
from duplex_jax.evaluate.benchmarks.ways import WAYS, Continuation
from duplex_jax.evaluate.conversations import Asking, SingleTurn, answer_rows, ask_questions, make_engine
from duplex_jax.model.minicpm import MiniCPM
from duplex_jax.tokenizer import decode

# Stands around a control token's name in a prompt that the chat template made: no text of a task holds it.
_MARK = "\0"
_MAX_TOKENS = 256


class _Wanted(NamedTuple):
    """What a request for words asks for."""

    context: str
    sampling: Sampling
    max_tokens: int
    until: tuple[str, ...]


@register_model("duplex_jax")
class DuplexLM(LM):  # type: ignore[misc, unused-ignore]
    """A model as the harness asks it.

    Args:
        model: as `load_model` takes it, or a loaded one.
        way: `plain`, the harness's prompt as it is; `turn_based`, the prompt as the user's message in the family's
            chat template; `duplex`, the prompt in slices of 4-6 words. The last two take a continuation without the
            white space in front of it: the assistant begins to speak there.
        rows: answers that are written at once.
        dtype: of the weights; float32 on CPU and bfloat16 elsewhere by default.
        capacity: most tokens of a context; 4096, or what the model has. What is longer loses its beginning, as the
            harness's own models do it.
        template: how slices become tokens, by name.
        batch_size, max_batch_size, device: the harness gives these to every model. Likelihoods are batched by length
            and JAX has its own devices, so they mean nothing here.

    Raises:
        UserError: an argument that makes no sense, or a model that cannot be loaded.
    """

    def __init__(
        self, model: str | LoadedModel = "", way: str = "plain", rows: int = 8, dtype: str = "auto", capacity: int = 0,
        template: str | None = None, batch_size: Any = None, max_batch_size: Any = None, device: Any = None,
        **unknown: Any,
    ):  # fmt: skip
        super().__init__()
        if unknown or not model:
            raise UserError(f"--model_args={','.join(unknown)}: must be model=M, and any of way, rows, dtype, capacity "
                            "and template, with commas between them")  # fmt: skip
        if way not in WAYS:
            raise UserError(f"way={way}: is unknown; one of {', '.join(WAYS)}")
        if not isinstance(rows, int) or not isinstance(capacity, int) or rows < 1 or capacity < 0:
            raise UserError(f"rows={rows}, capacity={capacity}: must be whole numbers, rows 1 or more")
        loaded = model if isinstance(model, LoadedModel) else load_model(model, dtype=dtype, template=template)
        self.model, self.way, self._rows = loaded, way, rows
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

    def _continuation(self, context: str, continuation: str) -> Continuation:
        if self.way != "plain" and context.strip():
            item = Item(context, (continuation.strip(),), 0)
            (found,) = WAYS[self.way](self.model.template, item, context)
        else:
            found = self._text(context, continuation)
        if not found.scored:
            raise UserError(f"the continuation {continuation!r} has no token of its own behind {context[-40:]!r}")
        return self._cut(found)

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

    def _scores(self, questions: Sequence[Sequence[Continuation]], quiet: bool) -> list[list[tuple[float, bool]]]:
        """By question and continuation the log-likelihood, and whether greedy decoding would say it."""
        rows = [make_row(continuations) for continuations in questions]
        found: dict[int, list[tuple[float, bool]]] = {}
        of = log_likelihoods(self._on_device, rows, self.model.template.stop_ids, self.capacity)
        for number, scores in tqdm(of, total=len(rows), disable=quiet, desc="Running loglikelihood requests"):
            found[number] = list(zip(scores.all, scores.greedy, strict=True))
        return [found[number] for number in range(len(rows))]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """By request, (context, continuation), the log-likelihood and whether greedy decoding would say it."""
        texts = [request.args for request in requests]
        # Continuations of one context are one row; equal ones are asked once.
        places: dict[str, dict[str, int]] = collections.defaultdict(dict)
        for context, continuation in texts:
            places[context].setdefault(continuation, len(places[context]))
        numbers = {context: number for number, context in enumerate(places)}
        questions = [[self._continuation(c, text) for text in texts_] for c, texts_ in places.items()]
        scores = self._scores(questions, disable_tqdm)
        found = [scores[numbers[context]][places[context][text]] for context, text in texts]
        for pair, score in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, score)
        return found

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
        for owner, ((score, _),) in zip(owners, self._scores(windows, disable_tqdm), strict=True):
            found[owner] += score
        for request, score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return found

    # Answers.

    @functools.cached_property
    def _engine(self) -> Engine:
        model = self.model
        return make_engine(model, self._rows, self.capacity, model.model.dtype)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """By request, (context, settings), what the model goes on with, up to the first of the stop texts."""
        wanted = [_wanted(*request.args) for request in requests]
        answers: dict[int, str] = {}
        with tqdm(total=len(wanted), disable=disable_tqdm, desc="Running generate_until requests") as bar:

            def done(number: int, text: str) -> None:
                answers[number] = postprocess_generated_text(text, list(wanted[number].until), None)
                self.cache_hook.add_partial("generate_until", requests[number].args, answers[number])
                bar.update()

            by = self._in_slices if self.way == "duplex" else self._by_turns
            by(wanted, done)
        return [answers[number] for number in range(len(wanted))]

    def _by_turns(self, wanted: Sequence[_Wanted], done: Any) -> None:
        """The longest prompts first, as many at once as there are rows; a row that is done takes the next one."""
        prompts = [self._prompt(w) for w in wanted]
        waiting = sorted(range(len(wanted)), key=lambda n: len(prompts[n]))
        live: dict[TurnSession, tuple[int, list[int]]] = {}
        try:
            while waiting or live:
                while waiting and len(live) < self._rows:
                    number = waiting.pop()
                    session = TurnSession(self._engine, sampling=wanted[number].sampling, start=())
                    session.go_on(prompts[number], wanted[number].max_tokens)
                    live[session] = number, []
                for session, ids in step_turns(live).items():
                    number, said = live[session]
                    said += ids
                    text = decode(self.model.tokenizer, said) if said else ""
                    if not session.answering or any(stop in text for stop in wanted[number].until):
                        del live[session]
                        session.close()
                        done(number, text)
        finally:
            for session in live:
                session.close()

    def _prompt(self, wanted: _Wanted) -> list[int]:
        if self.way == "turn_based":
            ids = self.model.template.turn_prompt([("user", wanted.context)])
        else:
            ids = [*self._start(wanted.context), *self._encode(wanted.context)] or [self._prefix_id]
        room = self.capacity - wanted.max_tokens - self._engine.max_slice_tokens
        if room < 1:
            raise UserError(f"max_gen_toks={wanted.max_tokens} leaves no room for a prompt in a context of "
                            f"{self.capacity} tokens; give a larger capacity")  # fmt: skip
        return ids[-room:]

    def _in_slices(self, wanted: Sequence[_Wanted], done: Any) -> None:
        """The prompt in slices, then silence until the model has fallen silent; see `conversations`."""
        alike = collections.defaultdict(list)
        for number, w in enumerate(wanted):
            alike[w.sampling, w.max_tokens].append(number)
        questions = [SingleTurn.of(str(n), w.context) for n, w in enumerate(wanted)]
        with tempfile.TemporaryDirectory() as folder:
            for (sampling, max_tokens), numbers in alike.items():
                records = Records(Path(folder) / f"{numbers[0]}.jsonl")
                asking = Asking(sampling, max_tokens=max_tokens)
                ask_questions(lambda: self._engine, "", questions, numbers, "duplex", asking, records, lambda n: None)
                for number in numbers:
                    (answer,) = answer_rows(questions[number], records, number)
                    done(number, answer["answer"] if answer else "")


def _wanted(context: str, settings: Mapping[str, Any]) -> _Wanted:
    """A request for words as the harness's own models read it: greedy unless it asks for samples."""
    kwargs: Any = normalize_gen_kwargs(dict(settings), _MAX_TOKENS)
    temperature = float(kwargs.get("temperature") or 0.0) if kwargs["do_sample"] else 0.0
    sampling = Sampling(temperature, float(kwargs.get("top_p", 1.0)), int(kwargs.get("top_k", 0)))
    return _Wanted(context, sampling, kwargs["max_gen_toks"], tuple(s for s in kwargs["until"] if s))
