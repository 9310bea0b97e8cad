"""Progress on the test's own clock: rates that do not round to nothing, no estimate from a first, slow item."""

import io

import pytest

from data_gen import progress
from data_gen.progress import Progress, per_time


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_rates():
    assert [per_time(r) for r in (1234.0, 2.0, 0.5, 0.02, 0.001)] == ["1,234/s", "2/s", "30/min", "72/h", "4/h"]


def test_the_first_item_is_no_estimate(monkeypatch: pytest.MonkeyPatch):
    """It took a minute to compile; the others take two seconds each."""
    clock, shown = Clock(), io.StringIO()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(shown, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", shown)
    with Progress("slices", 101) as counted:
        clock.now += 60
        counted.add()
        assert shown.getvalue().endswith("1 of 101 slices (1%)")
        for _ in range(2):
            clock.now += 2
            counted.add()
    assert shown.getvalue().rstrip().endswith("3 of 101 slices (3%), 30/min, 0:03:16 left")
