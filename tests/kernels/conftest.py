"""Without a GPU every Triton kernel runs in the interpreter; the switch counts at import time."""

import functools
import inspect
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

from sodfast_kernels.launch import INTERPRETED  # noqa: E402

if INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    patch_builtin = interpreter._patch_builtin

    @functools.cache
    def name_of_a_builtin(package: object) -> str | None:
        members = inspect.getmembers(package)
        return next((name for name, member in members if tl.core.is_builtin(member)), None)

    def patch_once(package: object, *rest: object) -> None:
        """The interpreter replaces Triton's language anew at every call inside a kernel, and takes
        a third of its time to find that nothing is left to replace."""
        name = name_of_a_builtin(package)
        if name is not None and tl.core.is_builtin(getattr(package, name)):
            patch_builtin(package, *rest)

    interpreter._patch_builtin = patch_once


@pytest.fixture(autouse=True)
def quiet_interpreter() -> Iterator[None]:
    """The interpreter computes both sides of a `where` and warns about the one not taken."""
    with np.errstate(all="ignore"):
        yield
