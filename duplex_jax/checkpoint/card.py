"""Metadata of exported models for other programs: model card and generation settings."""

import json
from pathlib import Path
from typing import Any

from duplex_jax.slicing import MAX_SLICE_TOKENS
from duplex_jax.template import Template
from duplex_jax.tokenizer import decode

CARD_FILE = "README.md"

_ELSEWHERE = 1024.0
"""Subtracted from the logit of idle except at a slice's beginning; a power of two, so that sums are exact."""


def stop_ids(template: Template) -> list[int]:
    """All tokens that end a slice or a turn; other programs keep a single list."""
    return sorted({*template.stop_ids, *template.turn_ends})


def generation_settings(template: Template) -> dict[str, Any]:
    """Fields of transformers' `generation_config.json` for a model trained on slices; empty for other models.

    `sequence_bias` adds the model's own bias to the logit of idle where a slice begins and suppresses idle elsewhere;
    `suppress_tokens` are the control tokens that end neither slice nor turn.
    """
    if not template.in_slices:
        return {}
    ends, idle = stop_ids(template), template.idle_id
    marker = _opening(template)
    return {
        "eos_token_id": ends,
        "sequence_bias": [[[idle], -_ELSEWHERE], [[*marker, idle], _ELSEWHERE + template.idle_bias]],
        "suppress_tokens": sorted(set(template.tokenizer.special.values()) - set(ends)) or None,
    }


def _opening(template: Template) -> list[int]:
    """The ids that occur only right before an assistant slice."""
    spoken, silent = template.user_part("a"), template.user_part(None)
    same = next(n for n in range(1, len(silent) + 1) if spoken[-n:] != silent[-n:] or n == len(silent)) - 1
    return silent[len(silent) - same :]


def _as_text(template: Template, ids: list[int]) -> str:
    names = {i: token for token, i in template.tokenizer.special.items()}
    return "".join(names[i] if i in names else decode(template.tokenizer, [i]) for i in ids)


def describe(template: Template) -> str:
    """How to prompt the model, in one line, for formats without room for more."""
    if not template.in_slices:
        return f"Prompted in turns: {_quoted(_turn(template))}"
    heard, silent = (_quoted(_as_text(template, template.user_part(x))) for x in (SLICE_EXAMPLE[0], None))
    end, idle = (_as_text(template, [i]) for i in (template.end_id, template.idle_id))
    return (
        f"Prompted in time slices: {heard}, or {silent} where the user is silent. The answer to each is at most "
        f"{MAX_SLICE_TOKENS} tokens that end with {end}, or {idle} alone, which is silence. {template.idle_bias:+g} "
        f"belongs on the logit of token {template.idle_id} where an answer begins; it never comes later."
    )


def adapter_card(name: str, base: str, template: Template) -> str:
    """The model card of a LoRA adapter."""
    return (
        f"{_title(name)}LoRA's updates of `{base}`. `duplex-jax convert --model=FOLDER --out=DIR` merges them for "
        f"transformers.\n\n{describe(template)} With PEFT, pass these settings to `generate`:\n\n"
        f"    {json.dumps(generation_settings(template))}\n"
    )


def _title(name: str) -> str:
    return f"# {Path(name.removeprefix('hf:')).stem}\n\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


SLICE_EXAMPLE = ("What is the capital", "of France?")


def _turn(template: Template) -> str:
    return _as_text(template, template.turn_prompt([("user", " ".join(SLICE_EXAMPLE))]))


def card(name: str, template: Template) -> str:
    """The card of an exported model: how to prompt it in slices and in turns, with an example program."""
    return _title(name) + (_SLICES if template.in_slices else _TURNS).format_map(_facts(template))


def _facts(template: Template) -> dict[str, Any]:
    user, silent = template.user_part("x0"), template.user_part(None)
    control = set(template.tokenizer.special.values())
    first = next(i for i, token in enumerate(user) if token not in control)
    last = next((i for i, token in enumerate(user[first:], first) if token in control), len(user))
    prefix, _, suffix = decode(template.tokenizer, user[first:last]).partition("x0")
    end, idle = template.end_id, template.idle_id
    return {
        "template": template.name,
        "turn": _quoted(_turn(template)),
        "chat": "The model's own chat template" if template.chat else f"The template `{template.name}`",
        "user": _quoted(_as_text(template, template.user_part(SLICE_EXAMPLE[0]))),
        "silence": _quoted(_as_text(template, silent)),
        "most": MAX_SLICE_TOKENS,
        "idle": _as_text(template, [idle]), "idle_id": idle, "end": _as_text(template, [end]),
        "start": template.start(), "head": user[:first], "tail": user[last:], "silent": silent,
        "prefix": _quoted(prefix), "suffix": _quoted(suffix),
        "stops": list(template.stop_ids),
        "closings": {i: template.closing([i]) for i in (idle, end)}, "closing": template.closing([]),
        "bias": f"{template.idle_bias:+g}", "opening": _as_text(template, _opening(template)),
        "slices": SLICE_EXAMPLE,
    }  # fmt: skip


_SLICES = """\
This model converses in time slices of two seconds, in the template `{template}` of duplex-jax.

## In slices

The first line below is a slice of the user's words; the second is a slice in which the user is silent:

    {user}
    {silence}

The model answers each with at most {most} tokens: words that end with `{end}`, or `{idle}` alone, which is silence.
At the first token of a slice, after `{opening}`, {bias} is added to the logit of `{idle}` ({idle_id}); at the other
tokens it is ruled out. `generation_config.json` does both for transformers. GGUF has no field for a bias: if it is not
0, the closest option of llama.cpp is `--logit-bias {idle_id}{bias}`.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
context = {start}


def step(user=None):
    \"\"\"Takes the user's words of a slice, or None for silence; returns the ids of the model's slice.\"\"\"
    text = {prefix} + (user or "") + {suffix}
    words = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    context.extend({head} + words + {tail} if user else {silent})
    said = model.generate(torch.tensor([context]), do_sample=False, max_new_tokens={most})[0, len(context) :].tolist()
    context.extend(said + {closings}.get(said[-1], {closing}))
    return [i for i in said if i not in {stops}]


def answer(*slices):
    \"\"\"Takes a message in slices of at most six words; returns the answer, up to the first silence.\"\"\"
    for user in slices[:-1]:
        step(user)
    said = [step(slices[-1])]
    while said[-1]:
        said.append(step())
    return tokenizer.decode(sum(said, []))


if __name__ == "__main__":
    print(answer{slices!r})
```

## In turns

A whole answer continues over slices in which the user is silent, as in `answer`. {chat} writes turns as

    {turn}

The model was trained on slices, so its answer to a turn ends after about {most} tokens.
"""

_TURNS = """\
This model converses in turns. It was not trained on time slices, but duplex-jax can run it in slices with the template
`{template}`. {chat} writes a turn as

    {turn}
"""
