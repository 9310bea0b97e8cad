"""What several tests of evaluations need."""

from collections.abc import Iterator

import pytest

from duplex_jax.errors import UserError
from duplex_jax.evaluate.sandbox import check_sandbox
from tests.data_gen.fake_server import FakeServer


@pytest.fixture
def _held() -> None:
    try:
        check_sandbox()
    except UserError as e:
        pytest.skip(str(e))


held = pytest.mark.usefixtures("_held")
"""Marks tests that run programs: they are skipped where nothing shuts these in."""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running
