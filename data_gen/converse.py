"""Generates dialogues: our users' everyday turns, answered by a chat model in short spoken sentences.

OUT.jsonl            the dialogues in UltraChat's layout, written last and atomically
OUT.manifest.json    the recipe, counts and hash
OUT.replies.sqlite   every reply, so that an interrupted run can continue and produces the same bytes
"""

import collections
import dataclasses
import hashlib
import json
import platform
import random
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from importlib import metadata
from pathlib import Path
from typing import Any

from data_gen import spoken
from data_gen.pipeline import Answers, manifest_path
from data_gen.progress import Progress
from data_gen.questions import Opening, fingerprint, openings, turns
from data_gen.rewriter import Request, Sampling
from duplex_jax.errors import UserError
from duplex_jax.files import atomic_write, locked
from duplex_jax.llm.client import Stopped

# Relative frequencies of dialogues with one, two, three and four rounds.
ROUNDS = (0.25, 0.35, 0.25, 0.15)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that determines the dialogues except the model's behaviour and where it runs.

    Attributes:
        number: number of dialogues to keep.
        seed: seed of the openings, the number of rounds and the turns that follow.
        questions: fingerprint of all openings.
        sampling: model, temperature and seed of its answers.
        attempts: refused answers after which the dialogue ends.
        prompt: hash of the prompts and their examples.
        max_tokens: most tokens of an answer.
        versions: versions of the programs that influence the result.
    """

    number: int
    seed: int
    questions: str
    sampling: Sampling
    attempts: int
    prompt: str
    max_tokens: int
    versions: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def make_recipe(number: int, seed: int, sampling: Sampling, attempts: int = 3) -> Recipe:
    """The recipe for `number` dialogues.

    Raises:
        UserError: there are fewer openings than that.
    """
    if number > (most := len(openings(seed))):
        raise UserError(f"--converse={number}: there are {most:,} different openings; ask for fewer dialogues")
    return Recipe(
        number=number,
        seed=seed,
        questions=fingerprint(seed),
        sampling=sampling,
        attempts=attempts,
        prompt=hashlib.sha256(json.dumps([spoken.messages([t]) for t in "?."]).encode()).hexdigest()[:16],
        max_tokens=spoken.MAX_TOKENS,
        versions={
            "python": ".".join(platform.python_version_tuple()[:2]),
            "duplex-jax": metadata.version("duplex-jax"),
        },
    )


@dataclasses.dataclass
class Talk:
    """A dialogue in progress.

    Attributes:
        index: index of its opening.
        queries: the user's turns.
        said: the turns so far: user, assistant, user, ...
        refused: why it ended before its last query; "" if it did not.
    """

    index: int
    queries: list[str]
    said: list[str] = dataclasses.field(default_factory=list)
    refused: str = ""

    @property
    def over(self) -> bool:
        return bool(self.refused) or len(self.said) == 2 * len(self.queries)

    def request(self, sampling: Sampling) -> Request:
        """The request for the next answer."""
        said = [*self.said, self.queries[len(self.said) // 2]]
        return Request("spoken", spoken.messages(said), spoken.MAX_TOKENS, sampling)


def plan(index: int, opening: Opening, seed: int) -> Talk:
    """Plans the user's side of a dialogue."""
    rng = random.Random(f"{seed}/converse/{index}")
    [rounds] = rng.choices(range(1, len(ROUNDS) + 1), ROUNDS)
    return Talk(index, turns(opening, rounds, rng))


@dataclasses.dataclass
class Summary:
    """The result of a run.

    Attributes:
        dialogues: number of dialogues kept.
        rounds: number of rounds in them.
        openings: number of openings tried.
        empty: dialogues that were dropped because their first answer was refused.
        refused: dialogues that ended early because all answers of a round were refused, by the last reason.
        unfinished: dialogues that still wait for answers; if there are any, nothing is written.
        stopped: why the run ended early; "" if it did not.
    """

    dialogues: int = 0
    rounds: int = 0
    openings: int = 0
    empty: int = 0
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    unfinished: int = 0
    stopped: str = ""


def converse(out: str | Path, recipe: Recipe, answers: Answers, concurrency: int = 16) -> Summary:
    """Generates the dialogues of a recipe, unless they exist already.

    Openings are taken in order until enough dialogues have a round. Equal answers give equal bytes, whatever the order
    in which they arrive.

    Args:
        out: the .jsonl file.
        recipe: the recipe.
        answers: provides the model's answers.
        concurrency: dialogues in progress at once.

    Raises:
        UserError: `out` is something else, or another run is writing there.
    """
    out = Path(out)
    if out.suffix != ".jsonl":
        raise UserError(f"--out={out}: --converse writes one file of dialogues; give a name that ends in .jsonl")
    with locked(out, beside=True):
        made = _made(out, recipe)
        if made is not None:
            return made
        talks, summary = _talk(recipe, answers, concurrency)
        if not summary.stopped and not summary.unfinished:
            _write(out, recipe, talks, summary)
    return summary


def _made(out: Path, recipe: Recipe) -> Summary | None:
    """The counts of an earlier, finished run; None if there is none."""
    if not out.exists():
        return None
    try:
        manifest = json.loads(manifest_path(out).read_text(encoding="utf-8"))
        theirs, summary = manifest["recipe"], Summary(**manifest["counts"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{out}: already exists without a manifest of how it was made; give another --out") from e
    for name, value in json.loads(json.dumps(recipe.as_json())).items():
        if theirs.get(name) != value:
            raise UserError(
                f"{out}: holds dialogues made with {name}={theirs.get(name)!r}, but this run has {value!r}; "
                "give another --out"
            )
    summary.refused = collections.Counter(summary.refused)
    return summary


def _talk(recipe: Recipe, answers: Answers, concurrency: int) -> tuple[list[Talk], Summary]:
    summary = Summary()
    waiting: Iterator[tuple[int, Opening]] = enumerate(openings(recipe.seed))
    flying: dict[Future, Talk] = {}
    kept: list[Talk] = []
    with Progress("dialogues", recipe.number) as progress:
        while True:
            # Never more than may be needed, so that the set of openings tried does not depend on the order of answers.
            while len(flying) < concurrency and len(kept) + len(flying) + summary.unfinished < recipe.number:
                index, opening = next(waiting, (0, None))
                if opening is None:
                    break
                summary.openings += 1
                talk = plan(index, opening, recipe.seed)
                flying[answers.answer([talk.request(recipe.sampling)])] = talk
            if not flying:
                break
            ready, _ = wait(flying, return_when=FIRST_COMPLETED)
            for future in ready:
                talk = flying.pop(future)
                try:
                    result = future.result()
                except Stopped as e:
                    summary.stopped = str(e)
                    summary.unfinished += len(flying) + 1
                    return kept, summary
                if result is None:
                    summary.unfinished += 1
                    continue
                request = talk.request(recipe.sampling)
                answer = result[request.key]
                if answer.text is None:
                    talk.refused = answer.reason
                    summary.refused[answer.reason] += 1
                else:
                    talk.said += [request.messages[-1][1], answer.text]
                if not talk.over:
                    flying[answers.answer([talk.request(recipe.sampling)])] = talk
                elif talk.said:
                    kept.append(talk)
                    progress.add()
                else:
                    summary.empty += 1
    summary.dialogues = len(kept)
    summary.rounds = sum(len(t.said) // 2 for t in kept)
    return sorted(kept, key=lambda t: t.index), summary


def _write(out: Path, recipe: Recipe, talks: list[Talk], summary: Summary) -> None:
    lines = [json.dumps({"id": f"converse-{recipe.seed}-{talk.index:06d}", "data": talk.said}) + "\n" for talk in talks]
    data = "".join(lines).encode()
    counts = dataclasses.asdict(summary) | {"refused": dict(sorted(summary.refused.items()))}
    manifest = {
        "file": out.name,
        "counts": counts,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "recipe": recipe.as_json(),
    }
    # The dialogues are written last: their presence means that they are complete.
    with atomic_write(manifest_path(out)) as f:
        json.dump(manifest, f, indent=1)
    with atomic_write(out, "wb") as f:
        f.write(data)
