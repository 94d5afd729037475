"""The tests that run a kernel: where none can run they are skipped, and none fails."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# The kernels' own, and others that ask for `backend="triton"`.
FILES = ["kernels", "bench/test_suite_correctness.py", "memory/test_trace.py"]
REASONS = {
    "needs a CUDA device",
    "needs a CUDA device, or TRITON_INTERPRET=1",
    "liger-kernel is absent",
}


@pytest.mark.exhaustive
def test_without_a_gpu_and_the_interpreter_every_test_passes_or_is_skipped():
    """As on a machine with a GPU, no tensor on the CPU reaches Triton: there it is refused."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    command += ["-m", "triton or not slow", f"--ignore={__file__}"]
    command += [str(TESTS / name) for name in FILES]
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    skipped = re.findall(r"^SKIPPED \[(\d+)\] \S+ (.*)$", result.stdout, re.MULTILINE)
    assert {reason for _, reason in skipped} <= REASONS
    assert sum(int(count) for count, _ in skipped) > 200
    (passed,) = re.findall(r"(\d+) passed", result.stdout)
    assert int(passed) > 200
