"""`python -m sodfast`: the command itself, and SIGTERM once the sweep that holds it lets go."""

import os
import runpy
import signal
import time
from collections.abc import Iterator

import pytest

from sodfast import cli


@pytest.fixture
def terminations() -> Iterator[list[int]]:
    """The SIGTERMs that reach this process."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, before)


def test_without_a_sweep_it_is_the_command(
    monkeypatch: pytest.MonkeyPatch, terminations: list[int]
) -> None:
    calls: list[str] = []
    monkeypatch.delenv("SODFAST_LEASH", raising=False)
    monkeypatch.setattr(cli, "main", lambda: calls.append("main"))
    runpy.run_module("sodfast", run_name="__main__")
    assert calls == ["main"] and not terminations


def test_the_end_of_the_sweep_is_a_sigterm(
    monkeypatch: pytest.MonkeyPatch, terminations: list[int]
) -> None:
    """Nothing while the sweep lives; and a process of the trial's own does not wait on its pipe."""
    reading, writing = os.pipe()
    monkeypatch.setenv("SODFAST_LEASH", str(reading))

    def trial() -> None:
        assert "SODFAST_LEASH" not in os.environ
        time.sleep(0.05)
        assert not terminations
        os.close(writing)
        deadline = time.monotonic() + 20
        while not terminations and time.monotonic() < deadline:
            time.sleep(0.01)

    monkeypatch.setattr(cli, "main", trial)
    runpy.run_module("sodfast", run_name="__main__")
    os.close(reading)
    assert terminations == [signal.SIGTERM]
