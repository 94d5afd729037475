"""The teacher's parameters follow the student's: copy, exponential moving average, distance.

    copy      φ ← θ                        6 bytes a bf16 parameter (read both, write one)
    EMA       φ ← φ + rate · (θ − φ)       6 bytes a bf16 parameter
    distance  ‖θ − φ‖₂                     4 bytes a bf16 parameter

θ is the student, φ the teacher (arXiv 2606.03532). All three return the distance before the update,
measured in the same pass and never sent to the host. A 16-bit φ is rounded stochastically: at small
rates rounding to nearest would return φ unchanged and lose most of the average's movement.
`ParameterUpdate` does any of them in parts, for parameters that are streamed through the device.

What has to be found out about the tensors (that they fit, which are tied, the kernel's tables of
pointers) is a function of their layout and is kept for the next call with the same one.

Under a CUDA graph (Triton path): make the same call once before the capture, and give `step` as a
tensor that the graph, or whoever replays it, counts on.

Shapes: P elements of one flattened parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..backend import uses_triton
from ..philox import CHUNK, GROUP, random_bits, rng_offsets, round_stochastic
from .layout import Layout, layout

if TYPE_CHECKING:
    from .items import Table


def copy_teacher_(
    teacher_params: Iterable[Tensor], student_params: Iterable[Tensor], *, backend: str = "auto"
) -> Tensor:
    """φ ← θ in place (rounded to nearest where φ is narrower).

    The arguments are floating tensors in the same order, with equal shapes, on one device; dtypes
    may differ. A tensor that occurs twice (tied weights) counts once.
    backend: "auto" (Triton on CUDA, PyTorch elsewhere and for fp64), "triton" or "torch"; all write
    the same bits.

    Returns ‖θ − φ_before‖₂, an fp32 scalar on the same device.
    Raises ValueError naming the argument when count, shape, dtype or device do not fit.
    """
    return _update_(teacher_params, student_params, 1.0, backend=backend)


def ema_update_(
    teacher_params: Iterable[Tensor],
    student_params: Iterable[Tensor],
    rate: float,
    *,
    seed: int = 0,
    step: int | Tensor = 0,
    backend: str = "auto",
) -> Tensor:
    """φ ← (1 − rate)·φ + rate·θ in place, computed in fp32 as φ + rate·(θ − φ).

    Parameters and backend as in `copy_teacher_`; rate in [0, 1], exact at both ends. A bf16 or fp16
    φ is rounded stochastically with random bits that are a function of (seed, step, position of the
    element), so pass a new `step` at every update: an int, or an int64 scalar on the parameters'
    device, which the kernel reads there (the PyTorch path waits for its value).

    Returns ‖θ − φ_before‖₂, an fp32 scalar on the same device.
    Raises ValueError naming the argument when count, shape, dtype, device, rate or step do not fit.
    """
    return _update_(teacher_params, student_params, rate, seed=seed, step=step, backend=backend)


def parameter_distance(
    teacher_params: Iterable[Tensor], student_params: Iterable[Tensor], *, backend: str = "auto"
) -> Tensor:
    """‖θ − φ‖₂, an fp32 scalar: bit for bit what an update of the same parameters would return.

    Parameters, backend and errors as in `copy_teacher_`; nothing is written.
    """
    return _update_(teacher_params, student_params, 0.0, backend=backend)


class ParameterUpdate:
    """φ ← φ + rate·(θ − φ) in parts: rate 0 the distance alone, 1 a copy.

    Given all parameters in order, however they are cut into parts (between, not inside, tied ones),
    the parameters become bit for bit what one call would make them. So does the distance on the
    PyTorch path; Triton's fp64 sums are grouped by part, which may move the last bits of a sum that
    is rounded to fp32 afterwards.

    Raises ValueError for a rate outside [0, 1].
    """

    def __init__(
        self, rate: float, *, seed: int = 0, step: int | Tensor = 0, backend: str = "auto"
    ) -> None:
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"rate must be in [0, 1], got {rate}")
        if isinstance(step, Tensor) and (step.dtype != torch.int64 or step.dim()):
            raise ValueError(
                f"step must be an int or an int64 scalar, got {step.dtype} {step.shape}"
            )
        self.rate, self.seed, self.step, self.backend = float(rate), seed, step, backend
        self._offset = 0  # position of the next part's first element in the random stream
        self._squares: list[Tensor] = []

    @torch.no_grad()
    def add(
        self,
        teacher_params: Iterable[Tensor],
        student_params: Iterable[Tensor],
        position: int | None = None,
    ) -> None:
        """Update one part. Arguments and errors as in `copy_teacher_`.

        position: of the part's first element in the stream of random bits, a multiple of GROUP;
        None: after the part before.
        """
        if position is not None:
            if position % GROUP:
                raise ValueError(f"position must be a multiple of {GROUP}, got {position}")
            self._offset = position
        teachers, students = _listed(teacher_params, student_params)
        plan = _plan(layout(teachers), layout(students), self._offset, self.backend)
        if not plan.visited:
            return
        teachers = [teachers[index] for index in plan.visited]
        students = [students[index] for index in plan.visited]
        if plan.strided:
            dense = [teacher.contiguous() for teacher in teachers]
            self.add(dense, [student.contiguous() for student in students])
            for teacher, updated in zip(teachers, dense, strict=True):
                if self.rate and updated is not teacher:
                    teacher.copy_(updated)
            return
        if plan.tables:
            self._update_in_tables(plan.tables, teachers)
        else:
            step = int(self.step)
            for teacher, student, offset in zip(teachers, students, plan.offsets, strict=True):
                item = teacher.view(-1), student.view(-1), offset
                self._squares.append(update_flat(*item, self.rate, self.seed, step))
        self._offset = plan.following

    def _update_in_tables(self, tables: Sequence[Table], teachers: list[Tensor]) -> None:
        from . import teacher_kernels

        device = teachers[0].device
        if isinstance(self.step, Tensor) and self.step.device != device:
            raise ValueError(f"step is on {self.step.device}, teacher_params[0] on {device}")
        self._squares.append(teacher_kernels.update(tables, self.rate, self.seed, self.step))
        if self.rate:
            torch.autograd.graph.increment_version(teachers)

    def distance(self) -> Tensor:
        """‖θ − φ_before‖₂ of the parts so far, an fp32 scalar on their device."""
        if not self._squares:
            return torch.zeros(())
        return torch.stack(self._squares).sum().sqrt().to(torch.float32)


def _update_(
    teacher_params: Iterable[Tensor], student_params: Iterable[Tensor], rate: float, **key: Any
) -> Tensor:
    update = ParameterUpdate(rate, **key)
    update.add(teacher_params, student_params)
    return update.distance()


def update_flat(
    teacher_P: Tensor, student_P: Tensor, offset: int, rate: float, seed: int, step: int
) -> Tensor:
    """Update one flat tensor; returns ‖θ − φ_before‖² in fp64, where squares of fp32 are exact."""
    wide = torch.float64 in (teacher_P.dtype, student_P.dtype)
    compute = torch.float64 if wide else torch.float32
    squares = torch.zeros((), dtype=torch.float64, device=teacher_P.device)
    for start in range(0, teacher_P.numel(), CHUNK):
        teacher_chunk = teacher_P[start : start + CHUNK]
        student_chunk = student_P[start : start + CHUNK]
        before = teacher_chunk.to(compute)
        difference = student_chunk.to(compute) - before
        squares += difference.double().square().sum()
        if rate == 1.0:
            teacher_chunk.copy_(student_chunk)
        elif rate > 0.0:
            after = before + difference * rate
            if teacher_chunk.dtype.itemsize == 2:
                bits = random_bits(
                    after.numel(),
                    seed=seed,
                    step=step,
                    offset=offset + start,
                    device=after.device,
                )
                after = round_stochastic(after.float(), bits, teacher_chunk.dtype)
            teacher_chunk.copy_(after)
    return squares


class Plan(NamedTuple):
    """What an update of tensors of one layout does."""

    visited: tuple[int, ...]  # their indices: tied ones once, empty ones left out
    offsets: tuple[int, ...]  # of the first elements of those in the stream of random bits
    following: int  # offset of what follows them
    strided: bool  # some of them are not contiguous: contiguous copies are updated instead
    tables: Sequence[Table]  # on the Triton path


# Sharded parameters are updated one at a time, streamed ones by layer: hundreds of layouts a step.
@lru_cache(maxsize=512)
def _plan(teachers: Layout, students: Layout, first: int, backend: str) -> Plan:
    """The plan for parameters whose first element is at `first` in the stream of random bits."""
    visited = _checked_pairs(teachers, students)
    both = [(side, index) for index in visited for side in (teachers, students)]
    kinds = {(side.devices[index], side.dtypes[index]) for side, index in both}
    triton = uses_triton(backend, [torch.empty(0, device=d, dtype=t) for d, t in kinds])
    strided = any(side.strides[index] is not None for side, index in both)
    numels = [teachers.shapes[index].numel() for index in visited]
    offsets, following = rng_offsets(numels, first)
    tables: Sequence[Table] = ()
    if triton and not strided:
        from . import teacher_kernels

        pairs = [
            teacher_kernels.Pair(
                numel,
                offset,
                teachers.addresses[index],
                students.addresses[index],
                teachers.dtypes[index],
                students.dtypes[index],
            )
            for index, numel, offset in zip(visited, numels, offsets, strict=True)
        ]
        tables = teacher_kernels.tables_of(pairs, teachers.devices[visited[0]])
    return Plan(tuple(visited), tuple(offsets), following, strided, tables)


def _listed(
    teacher_params: Iterable[Tensor], student_params: Iterable[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    for name, params in (("teacher_params", teacher_params), ("student_params", student_params)):
        if isinstance(params, Tensor):
            raise ValueError(f"{name} must be a list of tensors, got one tensor")
    teachers, students = list(teacher_params), list(student_params)
    if len(teachers) != len(students):
        raise ValueError(
            f"teacher_params has {len(teachers)} tensors but student_params has {len(students)}"
        )
    return teachers, students


def _checked_pairs(teachers: Layout, students: Layout) -> list[int]:
    """The indices of the tensors to visit: checked, tied ones once, empty ones left out."""
    seen: dict[tuple[object, ...], int] = {}
    visited = []
    for index, shape in enumerate(teachers.shapes):
        for name, side in (("teacher_params", teachers), ("student_params", students)):
            if side.dtypes[index] not in FLOATS:
                raise ValueError(
                    f"{name}[{index}] must be floating point, got {side.dtypes[index]}"
                )
            if side.devices[index] != teachers.devices[0]:
                raise ValueError(
                    f"{name}[{index}] is on {side.devices[index]}, teacher_params[0] on "
                    f"{teachers.devices[0]}"
                )
        if shape != students.shapes[index]:
            raise ValueError(
                f"student_params[{index}] has shape {tuple(students.shapes[index])}, "
                f"teacher_params[{index}] has {tuple(shape)}"
            )
        if shape.numel() == 0:
            continue
        first = seen.setdefault(_memory(teachers, index), index)
        if first == index:
            visited.append(index)
        elif _memory(students, first) != _memory(students, index):
            raise ValueError(
                f"teacher_params[{index}] is tied to teacher_params[{first}], but "
                f"student_params[{index}] is not tied to student_params[{first}]"
            )
    return visited


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _memory(side: Layout, index: int) -> tuple[object, ...]:
    """What two tied tensors have in common."""
    return side.addresses[index], side.shapes[index], side.strides[index], side.dtypes[index]
