"""A minute of `make fuzz`, the same cases every time, and what counts as a failure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Ended
from fuzz.campaign import judge

TESTS = Path(__file__).parents[1]


@pytest.mark.exhaustive
def test_damaged_files_are_refused_in_one_line() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "fuzz.campaign", "--seed", "0", "--cases", "6", "--minutes", "3"],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "all" in ended.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("code", "err", "written", "outside", "wrong"),
    [
        (0, "", True, False, ""),
        (2, "sodfast: a line\n", False, False, ""),
        (2, "sodfast: a line\n", True, False, "written although refused"),
        (2, "sodfast: a\nb\n", False, False, "2 lines"),
        (2, "", False, False, "0 lines"),
        (1, "Traceback (most recent call last)", False, False, "a traceback"),
        (0, "", False, True, "outside"),
        (-11, "", False, False, "signal 11"),
        (70, "", False, False, "exit code 70"),
    ],
)
def test_what_counts_as_a_failure(
    code: int, err: str, written: bool, outside: bool, wrong: str
) -> None:
    found = judge(Ended(code, "", err, 0.1), written, outside)
    assert wrong in found and bool(wrong) == bool(found)
