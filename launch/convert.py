"""`duplex-jax convert`: reads any supported checkpoint and writes it for transformers or Orbax."""

import time

from absl import flags, logging

from duplex_jax.checkpoint.registry import FORMATS, load_model, save_model
from duplex_jax.errors import UserError
from duplex_jax.files import check_folder
from launch import app

_MODEL = flags.DEFINE_string("model", None, "A folder, a .gguf or .safetensors file, hf:owner/name, or a known name.")
_OUT = flags.DEFINE_string("out", None, "The folder to write; it appears complete or not at all.")
_FORMAT = flags.DEFINE_enum("format", "hf", FORMATS, "hf: transformers loads it. orbax: training starts from it.")
_DTYPE = flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16; each tensor's own by default.")
_TEMPLATE = flags.DEFINE_string("template", None, "How slices become tokens; tokens that it needs are added.")
_HF_TYPE = flags.DEFINE_enum(
    "hf_type", "auto", ("auto", "minicpm"),
    "auto: Llama, or Granite where there are scales. minicpm: the released MiniCPM's keys, for llama.cpp's converter.",
)  # fmt: skip
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace --out where it is there and not empty.")


def main(argv: list[str]) -> None:
    """Loads and writes."""
    app.no_arguments(argv)
    if not _MODEL.value or not _OUT.value:
        raise UserError("convert needs --model=M and --out=DIR")
    check_folder(_OUT.value, _OVERWRITE.value)  # before any time is spent
    start = time.perf_counter()
    model = load_model(_MODEL.value, dtype=_DTYPE.value, template=_TEMPLATE.value)
    loaded = time.perf_counter()
    save_model(model, _OUT.value, format=_FORMAT.value, hf_type=_HF_TYPE.value, overwrite=_OVERWRITE.value)
    logging.info("loaded in %.1f s, written in %.1f s", loaded - start, time.perf_counter() - loaded)
    print(
        f"{_OUT.value}: {model.config.num_params:,} weights, {model.params['embed'].dtype.name}, "
        f"vocabulary {model.config.vocab_size}, template {model.template.name}"
    )


def start() -> None:
    """Runs the job."""
    app.run(main)


if __name__ == "__main__":
    start()
