"""What the launches of all Triton kernels share. Imported only when one of them runs."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton

from .philox import WORD

INTERPRETED: bool = triton.knobs.runtime.interpret


class Sweep(NamedTuple):
    """A loop of a kernel over its data, for bench/compile_report.py.

    bytes: read and written an element of the loop.
    share: how often the loop sees an element; 0 for what only a rare row takes.
    elements: of a thread at a time; None: those of a tile.
    """

    bytes: float
    share: float = 1.0
    elements: int | None = None


class Configuration(NamedTuple):
    """One compiled variant of a kernel, for bench/compile_report.py.

    signature: Triton's type of each argument; ":16" marks an integer that 16 divides.
    streamed: the arguments whose accesses must be wide; where they are tables of pointers, with the
        bits of an element behind the pointer.
    sweeps: its loops, by a function that only the loop's instructions come from; {} where nothing
        is counted, because it has no loop over its data or need not be fast.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]
    streamed: list[str] | dict[str, int]
    sweeps: Mapping[str, Sweep]


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def power_of_two(value: int) -> int:
    """The least that is not below `value`; Triton's own is made for kernels and slow outside."""
    return 1 << (value - 1).bit_length()


def words(number: int) -> tuple[int, int]:
    """Low and high 32 bits, as signed integers so that their type never depends on the value."""
    low, high = number & WORD, (number >> 32) & WORD
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)
