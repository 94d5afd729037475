"""Without a GPU every Triton kernel runs in the interpreter; the switch counts at import time."""

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

from sodfast_kernels.launch import INTERPRETED  # noqa: E402

CAN_RUN_TRITON = torch.cuda.is_available() or INTERPRETED


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("triton") and not CAN_RUN_TRITON:
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def quiet_interpreter() -> Iterator[None]:
    """The interpreter computes both sides of a `where` and warns about the one not taken."""
    with np.errstate(all="ignore"):
        yield
