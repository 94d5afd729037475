"""Triton: teacher copy, average and distance, all parameters in one launch (see items.py).

    copy      φ ← θ                        6 bytes a bf16 parameter (read both, write one)
    average   φ ← φ + rate · (θ − φ)       6
    distance  ‖θ − φ‖₂                     4

All arithmetic is that of the PyTorch path in teacher.py, which defines the results bit for bit:
integer rounding, no fused multiply-add. Imported only when a Triton backend runs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Configuration, Sweep, words
from ..rounding import random_bits, round_nearest, round_stochastic
from .items import (
    BITS,
    DTYPES,
    OPTIONS,
    PRODUCTION,
    Table,
    alike,
    as_int64,
    find_item,
    is_vector,
    item_pointer,
    load_words,
)

DISTANCE, COPY, AVERAGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def update_kernel(
    squares_ptr,
    step_ptr,
    first_program_table,
    numel_table,
    offset_table,
    teacher_table,
    student_table,
    rate,
    seed_low,
    seed_high,
    TEACHER: tl.constexpr,
    STUDENT: tl.constexpr,
    MODE: tl.constexpr,
    VECTOR: tl.constexpr,
    TENSORS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """φ ← θ or φ + rate·(θ − φ) or nothing, and Σ (θ − φ_before)² of the program's elements."""
    tensor, start, stop, numel = find_item(first_program_table, numel_table, VECTOR, TENSORS, CHUNK)
    teacher_ptr = item_pointer(teacher_table, tensor, TEACHER, VECTOR)
    student_ptr = item_pointer(student_table, tensor, STUDENT, VECTOR)
    offset = tl.load(offset_table + tensor)
    step_low, step_high = load_words(step_ptr)
    squares = tl.zeros([BLOCK_SIZE], tl.float64)
    for begin in range(start, stop, BLOCK_SIZE):
        at = begin + tl.arange(0, BLOCK_SIZE)
        mask = at < numel
        student = tl.load(student_ptr + at, mask=mask, other=0.0)
        before = tl.load(teacher_ptr + at, mask=mask, other=0.0).to(tl.float32)
        difference = student.to(tl.float32) - before
        wide = difference.to(tl.float64)
        squares = tl.fma(wide, wide, squares)  # the product of two fp32 is exact in fp64
        if MODE == COPY:
            if TEACHER == STUDENT:
                tl.store(teacher_ptr + at, student, mask=mask)
            else:
                rounded = round_nearest(student.to(tl.float32), TEACHER)
                tl.store(teacher_ptr + at, rounded, mask=mask)
        if MODE == AVERAGE:
            after = before + difference * rate
            if tl.float32 == TEACHER:
                tl.store(teacher_ptr + at, after, mask=mask)
            else:
                first_group = (offset + begin) // 8
                bits = random_bits(
                    first_group, seed_low, seed_high, step_low, step_high, BLOCK_SIZE // 8
                )
                tl.store(teacher_ptr + at, round_stochastic(after, bits, TEACHER), mask=mask)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(squares))


class Pair(NamedTuple):
    """A contiguous tensor of the teacher and one of the student."""

    numel: int
    offset: int  # of the first element in the stream of random bits
    teacher: int  # address
    student: int
    teacher_dtype: torch.dtype
    student_dtype: torch.dtype


def tables_of(pairs: Sequence[Pair], device: torch.device) -> list[Table]:
    """What `update` needs to know of the pairs: a table for those that one launch can update."""

    def kind(pair: Pair) -> tuple[torch.dtype, torch.dtype, bool]:
        vector = is_vector(pair.numel, pair.teacher, pair.student)
        return pair.teacher_dtype, pair.student_dtype, vector

    found = []
    for group in alike(pairs, kind):
        rows = {
            name: [getattr(p, name) for p in group] for name in ("offset", "teacher", "student")
        }
        teacher, student, vector = kind(group[0])
        constants = {"TEACHER": DTYPES[teacher], "STUDENT": DTYPES[student], "VECTOR": vector}
        found.append(Table([pair.numel for pair in group], device, rows, constants))
    return found


def update(tables: Sequence[Table], rate: float, seed: int, step: int | Tensor) -> Tensor:
    """Update the pairs that the tables are of; returns Σ (θ − φ_before)² in fp64.

    step: a tensor is read by the kernel, so that a CUDA graph finds in it what it then holds.
    """
    if not isinstance(step, Tensor):
        step = torch.full((), as_int64(step), dtype=torch.int64, device=tables[0].device)
    seed_low, seed_high = words(seed)
    sums = []
    for table in tables:
        squares = table.partial_sums()
        table.launch(
            update_kernel,
            squares_ptr=squares,
            step_ptr=step,
            rate=rate,
            seed_low=seed_low,
            seed_high=seed_high,
            MODE={0.0: DISTANCE, 1.0: COPY}.get(rate, AVERAGE),
        )
        sums.append(squares.sum())
    return torch.stack(sums).sum()


# What bench/compile_report.py compiles: each mode, and how often it reads or writes the teacher.
MODES = {"distance": (DISTANCE, 1), "copy": (COPY, 2), "average": (AVERAGE, 2)}


def production_configurations() -> list[Configuration]:
    """What bench/compile_report.py checks. Streamed tensors lie behind tables, so their bits an
    element are given."""
    tables = ["first_program", "numel", "offset", "teacher", "student"]
    signature = {
        "squares_ptr": "*fp64",
        "step_ptr": "*i64",
        **{f"{name}_table": "*i64" for name in tables},
        "rate": "fp32",
        **dict.fromkeys(["seed_low", "seed_high"], "i32"),
    }
    return [
        Configuration(
            f"{name}_{teacher}_from_{student}",
            update_kernel,
            signature,
            {"TEACHER": teacher, "STUDENT": student, "MODE": mode, **PRODUCTION},
            OPTIONS,
            {"teacher_table": BITS[teacher], "student_table": BITS[student]},
            {"update_kernel": Sweep((BITS[student] + accesses * BITS[teacher]) / 8)},
        )
        for name, (mode, accesses) in MODES.items()
        for student in BITS
        for teacher in BITS
    ]
