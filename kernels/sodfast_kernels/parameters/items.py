"""Triton: one launch works on many tensors, which a table of work items tells apart.

Tensors of one kind (dtypes, hyperparameters) share a launch. A table holds their pointers, one
column a tensor, and each program works on CHUNK elements of the tensor it finds there. Accesses are
16 bytes wide (8-bit moments: 8) for tensors whose address and size allow it; others are launched
apart.

Norms: one fp64 partial sum a program, summed afterwards, no atomics.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import power_of_two

BLOCK_SIZE = 1024  # elements handled at a time by a program: 8 a thread
CHUNK = 32 * BLOCK_SIZE  # elements of a program
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
LAUNCH: dict[str, Any] = {"BLOCK_SIZE": BLOCK_SIZE, "CHUNK": CHUNK} | OPTIONS
NO_PROGRAM = 1 << 62  # pads the table
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

Item = TypeVar("Item")


@triton.jit
def find_item(first_program_table, numel_table, CHUNK: tl.constexpr, TENSORS: tl.constexpr):
    """The tensor that this program works on, and the range of its elements there."""
    program = tl.program_id(0)
    first_programs = tl.load(first_program_table + tl.arange(0, TENSORS))
    tensor = tl.sum((first_programs <= program).to(tl.int32)) - 1
    start = (program - tl.load(first_program_table + tensor)) * CHUNK
    numel = tl.load(numel_table + tensor)
    return tensor, start, tl.minimum(start + CHUNK, numel), numel


@triton.jit
def item_pointer(table, tensor, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    pointer = tl.load(table + tensor).to(tl.pointer_type(DTYPE))
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


class Table:
    """Which program works on which tensor, as rows of integers for the kernel to look up."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.numels = [tensor.numel() for tensor in tensors]
        counts = [-(-numel // CHUNK) for numel in self.numels]
        self.programs = sum(counts)
        self.columns = max(2, power_of_two(len(counts)))
        self.device = tensors[0].device
        firsts = [sum(counts[:index]) for index in range(len(counts))]
        self.first_programs = firsts + [NO_PROGRAM] * (self.columns - len(firsts))

    def arguments(self, **rows: Sequence[int]) -> dict[str, Any]:
        """First programs, numbers of elements and `rows` as the kernel's arguments NAME_table."""
        named = {"first_program": self.first_programs, "numel": self.numels, **rows}
        padded = [[*row, *[0] * (self.columns - len(row))] for row in named.values()]
        table = torch.tensor(padded, dtype=torch.int64)
        if self.device.type == "cuda":
            # From pinned memory, so that the host need not wait.
            table = table.pin_memory().to(self.device, non_blocking=True)
        found = {f"{name}_table": row for name, row in zip(named, table.unbind(), strict=True)}
        return {**found, "TENSORS": self.columns, **LAUNCH}

    def partial_sums(self) -> Tensor:
        return torch.empty(self.programs, dtype=torch.float64, device=self.device)


def alike(items: Sequence[Item], kind: Callable[[Item], Hashable]) -> list[list[Item]]:
    """The items in groups of the same kind."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(kind(item), []).append(item)
    return list(groups.values())


def is_vector(*tensors: Tensor) -> bool:
    """Whether 16-byte accesses fit: address and size are multiples of 16."""
    return all(t.data_ptr() % 16 == 0 and t.numel() % 16 == 0 for t in tensors)


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
