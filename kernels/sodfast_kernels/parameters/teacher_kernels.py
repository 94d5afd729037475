"""Triton: teacher copy, average and distance, all parameters in one launch (see items.py).

    copy      φ ← θ                        6 bytes a bf16 parameter (read both, write one)
    average   φ ← φ + rate · (θ − φ)       6
    distance  ‖θ − φ‖₂                     4

All arithmetic is that of the PyTorch path in teacher.py, which defines the results bit for bit:
integer rounding, no fused multiply-add. Imported only when a Triton backend runs.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Configuration, on_device, words
from ..rounding import random_bits, round_nearest, round_stochastic
from .items import (
    BLOCK_SIZE,
    CHUNK,
    DTYPES,
    OPTIONS,
    Table,
    addresses,
    alike,
    find_item,
    is_vector,
    item_pointer,
)

DISTANCE, COPY, AVERAGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step_low", "step_high"])
def update_kernel(
    squares_ptr,
    first_program_table,
    numel_table,
    offset_table,
    teacher_table,
    student_table,
    rate,
    seed_low,
    seed_high,
    step_low,
    step_high,
    TEACHER: tl.constexpr,
    STUDENT: tl.constexpr,
    MODE: tl.constexpr,
    VECTOR: tl.constexpr,
    TENSORS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """φ ← θ or φ + rate·(θ − φ) or nothing, and Σ (θ − φ_before)² of the program's elements."""
    tensor, start, stop, numel = find_item(first_program_table, numel_table, CHUNK, TENSORS)
    if VECTOR:
        numel = numel // 16 * 16  # which the compiler then knows
    teacher_ptr = item_pointer(teacher_table, tensor, TEACHER, VECTOR)
    student_ptr = item_pointer(student_table, tensor, STUDENT, VECTOR)
    offset = tl.load(offset_table + tensor)
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


def update(work: Sequence[tuple[Tensor, Tensor, int]], rate: float, seed: int, step: int) -> Tensor:
    """Update (teacher_P, student_P, offset of the first element); returns Σ (θ − φ)² in fp64."""
    sums = []
    seed_low, seed_high = words(seed)
    step_low, step_high = words(step)
    for group in alike(work, lambda item: (item[0].dtype, item[1].dtype, is_vector(*item[:2]))):
        teachers, students, offsets = zip(*group, strict=True)
        table = Table(teachers)
        squares = table.partial_sums()
        with on_device(table.device):
            update_kernel[(table.programs,)](
                squares_ptr=squares,
                rate=rate,
                seed_low=seed_low,
                seed_high=seed_high,
                step_low=step_low,
                step_high=step_high,
                TEACHER=DTYPES[teachers[0].dtype],
                STUDENT=DTYPES[students[0].dtype],
                MODE={0.0: DISTANCE, 1.0: COPY}.get(rate, AVERAGE),
                VECTOR=is_vector(*group[0][:2]),
                **table.arguments(
                    offset=offsets, teacher=addresses(teachers), student=addresses(students)
                ),
            )
        if rate:
            torch.autograd.graph.increment_version(teachers)
        sums.append(squares.sum())
    return torch.stack(sums).sum()


def production_configurations() -> list[Configuration]:
    """What bench/compile_report.py checks: bf16 and fp32 models of up to 512 tensors, all sizes
    multiples of 16. Streamed tensors lie behind tables, so their bits an element are given."""
    tables = ["first_program", "numel", "offset", "teacher", "student"]
    signature = {
        "squares_ptr": "*fp64",
        **{f"{name}_table": "*i64" for name in tables},
        "rate": "fp32",
        **dict.fromkeys(["seed_low", "seed_high", "step_low", "step_high"], "i32"),
    }
    shape = {"VECTOR": True, "TENSORS": 512, "BLOCK_SIZE": BLOCK_SIZE, "CHUNK": CHUNK}
    bits = {tl.float32: 32, tl.bfloat16: 16}
    return [
        Configuration(
            f"{name}_{teacher}_from_{student}",
            update_kernel,
            signature,
            {"TEACHER": teacher, "STUDENT": student, "MODE": mode, **shape},
            OPTIONS,
            {"teacher_table": bits[teacher], "student_table": bits[student]},
        )
        for name, mode in (("distance", DISTANCE), ("copy", COPY), ("average", AVERAGE))
        for student in (tl.bfloat16, tl.float32)
        for teacher in (tl.bfloat16, tl.float32)
    ]
