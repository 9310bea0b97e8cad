"""`duplex-jax convert`: reads any supported checkpoint and writes it for transformers, Orbax or llama.cpp."""

import dataclasses
import time
from pathlib import Path

import jax
from absl import flags, logging

from duplex_jax.checkpoint import adapter, gguf, peft
from duplex_jax.checkpoint.card import adapter_card
from duplex_jax.checkpoint.names import as_dtype
from duplex_jax.checkpoint.registry import FORMATS, load_model, save_model
from duplex_jax.checkpoint.resolve import load_template
from duplex_jax.decode.sampling import Sampling
from duplex_jax.errors import UserError
from duplex_jax.files import check_folder, check_new_file
from launch import app

_MODEL = app.path_flag("model", None, "Model: a folder, a .gguf or .safetensors file, hf:owner/name, or a known name.")
_OUT = app.path_flag("out", None, "Output folder (or .gguf file); it appears complete or not at all.")
_FORMAT = flags.DEFINE_enum(
    "format", "hf", (*FORMATS, "adapter", "peft"),
    "hf: for transformers. orbax: a checkpoint to train from. gguf: for llama.cpp. adapter: only the LoRA updates of "
    "an adapter or checkpoint (--model=WORKDIR for the newest, or WORKDIR@STEP). peft: the same for Hugging Face "
    "PEFT.",
)  # fmt: skip
_DTYPE = flags.DEFINE_string(
    "dtype",
    None,
    "float32, bfloat16 or float16; by default each tensor keeps its dtype. gguf: also q8_0; default float16.",
)
_TEMPLATE = flags.DEFINE_string(
    "template", None, "Template that turns slices into tokens; missing control tokens are added."
)
_HF_TYPE = flags.DEFINE_enum(
    "hf_type", "auto", ("auto", "minicpm"),
    "auto: Llama, or Granite if the model has scales. minicpm: MiniCPM's released keys, for llama.cpp's converter.",
)  # fmt: skip
_IDLE_BIAS = flags.DEFINE_float(
    "idle_bias", None, "Bias on <idle> stored in the export; by default unchanged. `evaluate behaviour` plots the "
    "curve to choose it from.",
)  # fmt: skip
_OVERWRITE = flags.DEFINE_boolean(
    "overwrite", False, "Replace --out if it exists and is not empty; an adapter's README.md is kept."
)


def main(argv: list[str]) -> None:
    """Loads a checkpoint and writes it in another format."""
    app.no_arguments(argv)
    if not _MODEL.value or not _OUT.value:
        raise UserError("convert needs --model=M and --out=DIR")
    # Checked before any work is done.
    if _FORMAT.value == "gguf":
        if not _OUT.value.endswith(".gguf"):
            raise UserError(f"--out={_OUT.value}: --format=gguf writes a file; give a name that ends in .gguf")
        if _DTYPE.value not in (None, *gguf.WRITTEN):
            raise UserError(f"--dtype={_DTYPE.value}: one of {', '.join(gguf.WRITTEN)} for --format=gguf")
    app.claim(_OUT.value, beside=True)
    if _FORMAT.value == "gguf":
        check_new_file(_OUT.value, _OVERWRITE.value)
    else:
        check_folder(_OUT.value, _OVERWRITE.value)
    start = time.perf_counter()
    if _FORMAT.value in ("adapter", "peft"):
        _write_adapter(_MODEL.value, _OUT.value)
        return
    is_gguf = _FORMAT.value == "gguf"
    given, unread = None if is_gguf else _DTYPE.value, _FORMAT.value != "orbax"
    model = load_model(_MODEL.value, dtype=given, template=_TEMPLATE.value, unread=unread)
    if _IDLE_BIAS.value is not None:
        model.template.idle_bias = Sampling(idle_bias=_IDLE_BIAS.value).idle_bias
    loaded = time.perf_counter()
    save_model(
        model, _OUT.value, format=_FORMAT.value, dtype=_DTYPE.value if is_gguf else None, hf_type=_HF_TYPE.value,
        overwrite=_OVERWRITE.value,
    )  # fmt: skip
    logging.info("loaded in %.1f s, written in %.1f s", loaded - start, time.perf_counter() - loaded)
    dtype = (_DTYPE.value or "float16") if is_gguf else model.model.dtype.name
    print(
        f"{_OUT.value}: {model.config.num_params:,} weights, {dtype}, "
        f"vocabulary {model.config.vocab_size}, template {model.template.name}"
    )


def _write_adapter(model: str, out: str) -> None:
    from duplex_jax.train.export import read_adapter

    if _TEMPLATE.value:
        raise UserError(f"--template={_TEMPLATE.value}: an adapter keeps its training template; leave the flag out")
    what, trained = read_adapter(model)
    if _IDLE_BIAS.value is not None:
        what = dataclasses.replace(what, idle_bias=Sampling(idle_bias=_IDLE_BIAS.value).idle_bias)
    dtype, card = _DTYPE.value or "float32", _card_of(what, out)
    if _FORMAT.value == "peft":
        kind = as_dtype(dtype)
        assert kind is not None
        peft.save(out, what, trained, kind, _OVERWRITE.value, card)
    else:
        adapter.save(out, what, trained, dtype, _OVERWRITE.value, card)
    weights = sum(int(x.size) for x in jax.tree.leaves(trained))
    size = sum(p.stat().st_size for p in Path(out).iterdir()) / 1e6
    step = f", step {what.training['step']}" if "step" in what.training else ""
    print(f"{out}: adapter of {what.base}, rank {what.rank}, {weights:,} weights, {dtype}, {size:.1f} MB, "
          f"template {what.template}{step}")  # fmt: skip


def _card_of(what: adapter.Adapter, out: str) -> str:
    try:
        template = load_template(what.base, what.template)
    except UserError:  # an adapter can be copied even without its base
        return ""
    template.idle_bias, template.in_slices = what.idle_bias, True
    return adapter_card(Path(out).name, what.base, template)


def start() -> None:
    """Runs the job."""
    app.run(main)


if __name__ == "__main__":
    start()
