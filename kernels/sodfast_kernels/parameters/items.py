"""Triton: one launch works on many tensors, which a table of work items tells apart.

Tensors of one kind (dtypes, hyperparameters) share a launch. A table holds their pointers, one
column a tensor, and each program works on CHUNK elements of the tensor it finds there. Accesses are
16 bytes wide (8-bit moments: 8) for tensors whose address and size allow it; others are launched
apart.

Norms: one fp64 partial sum a program, summed afterwards, no atomics.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device, power_of_two
from ..philox import WORD
from .layout import is_capturing

BLOCK_SIZE = 1024  # elements handled at a time by a program: 8 a thread
CHUNK = 32 * BLOCK_SIZE  # elements of a program
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
LAUNCH: dict[str, Any] = {"BLOCK_SIZE": BLOCK_SIZE, "CHUNK": CHUNK} | OPTIONS
NO_PROGRAM = 1 << 62  # pads the table
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# What bench/compile_report.py compiles: a model of up to 512 tensors, all sizes multiples of 16.
PRODUCTION = {"VECTOR": True, "TENSORS": 512, "BLOCK_SIZE": BLOCK_SIZE, "CHUNK": CHUNK}
BITS = {tl.bfloat16: 16, tl.float32: 32}  # of an element, by the dtypes compiled there

Item = TypeVar("Item")


@triton.jit
def find_item(
    first_program_table,
    numel_table,
    VECTOR: tl.constexpr,
    TENSORS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The tensor that this program works on, the range of its elements there, and their number."""
    program = tl.program_id(0)
    first_programs = tl.load(first_program_table + tl.arange(0, TENSORS))
    tensor = tl.sum((first_programs <= program).to(tl.int32)) - 1
    start = (program - tl.load(first_program_table + tensor)) * CHUNK
    numel = tl.load(numel_table + tensor)
    stop = tl.minimum(start + CHUNK, numel)
    if VECTOR:
        numel = numel // 16 * 16  # which the compiler then knows
    return tensor, start, stop, numel


@triton.jit
def item_pointer(table, tensor, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    pointer = tl.load(table + tensor).to(tl.pointer_type(DTYPE))
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_scalar(pointer):
    """In fp32, the fp64 number of which an int64 tensor holds the bits."""
    return tl.load(pointer).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def load_words(pointer):
    """Low and high 32 bits of the int64 there."""
    number = tl.load(pointer)
    return number.to(tl.int32), (number >> 32).to(tl.int32)


class Table:
    """Which program works on which tensor, as rows of integers for the kernel to look up.

    numels: elements of each tensor. rows: what else the kernel looks up of each, as its arguments
    NAME_table. constants: of its other arguments, those that never change.
    """

    def __init__(
        self,
        numels: Sequence[int],
        device: torch.device,
        rows: Mapping[str, Sequence[int]],
        constants: dict[str, Any],
    ) -> None:
        counts = [-(-numel // CHUNK) for numel in numels]
        *firsts, self.programs = accumulate(counts, initial=0)
        self.device = device
        self.columns = max(2, power_of_two(len(counts)))
        self.arguments = {"TENSORS": self.columns, **constants, **LAUNCH}
        padded = [
            firsts + [NO_PROGRAM] * (self.columns - len(firsts)),
            *(self.padded(row) for row in (numels, *rows.values())),
        ]
        table = to_device(torch.tensor(padded, dtype=torch.int64), device)
        for name, row in zip(("first_program", "numel", *rows), table.unbind(), strict=True):
            self.arguments[f"{name}_table"] = row

    def padded(self, row: Sequence[int]) -> list[int]:
        return [*row, *[0] * (self.columns - len(row))]

    def partial_sums(self) -> Tensor:
        return torch.empty(self.programs, dtype=torch.float64, device=self.device)

    def launch(self, kernel: Any, **arguments: Any) -> None:
        with on_device(self.device):
            if is_capturing(self.device):
                _CAPTURED.add(self)
            kernel[(self.programs,)](**self.arguments, **arguments)


# Tables that a CUDA graph reads. They are kept for good, since nothing tells when a graph is gone.
_CAPTURED: set[Table] = set()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """From pinned memory, so that the host need not wait.

    Raises RuntimeError while a CUDA graph is captured, which would copy again from memory that is
    no longer ours.
    """
    if device.type != "cuda":
        return values
    if is_capturing(device):
        raise RuntimeError(
            "a CUDA graph is being captured, and these tensors are new: make the same call once "
            "before the capture, with parameters, gradients and state where they will stay"
        )
    return values.pin_memory().to(device, non_blocking=True)


def write(target: Tensor, values: Tensor) -> None:
    """Copy what is on the host into `target`, without waiting where that is on a GPU."""
    target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)


def as_int64(number: int) -> int:
    """The signed integer of the same low 64 bits."""
    low = number & (WORD << 32 | WORD)
    return low - (low >> 63 << 64)


def alike(items: Sequence[Item], kind: Callable[[Item], Hashable]) -> list[list[Item]]:
    """The items in groups of the same kind."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(kind(item), []).append(item)
    return list(groups.values())


def is_vector(numel: int, *addresses: int) -> bool:
    """Whether 16-byte accesses fit: addresses and size are multiples of 16."""
    return numel % 16 == 0 and all(address % 16 == 0 for address in addresses)
