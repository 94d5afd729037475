"""The teacher's parameters follow the student's: copy, exponential moving average, distance.

    copy      φ ← θ                        6 bytes a bf16 parameter (read both, write one)
    EMA       φ ← φ + rate · (θ − φ)       6 bytes a bf16 parameter
    distance  ‖θ − φ‖₂                     4 bytes a bf16 parameter

θ is the student, φ the teacher (arXiv 2606.03532). All three return the distance before the update,
measured in the same pass and never sent to the host. A 16-bit φ is rounded stochastically: at small
rates rounding to nearest would return φ unchanged and lose most of the average's movement.
`ParameterUpdate` does any of them in parts, for parameters that are streamed through the device.

Shapes: P elements of one flattened parameter.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..backend import uses_triton
from ..philox import CHUNK, GROUP, random_bits, rng_offsets, round_stochastic


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
    step: int = 0,
    backend: str = "auto",
) -> Tensor:
    """φ ← (1 − rate)·φ + rate·θ in place, computed in fp32 as φ + rate·(θ − φ).

    Parameters and backend as in `copy_teacher_`; rate in [0, 1], exact at both ends. A bf16 or fp16
    φ is rounded stochastically with random bits that are a function of (seed, step, position of the
    element), so pass a new `step` at every update.

    Returns ‖θ − φ_before‖₂, an fp32 scalar on the same device.
    Raises ValueError naming the argument when count, shape, dtype, device or rate do not fit.
    """
    return _update_(teacher_params, student_params, rate, seed, step, backend)


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

    def __init__(self, rate: float, *, seed: int = 0, step: int = 0, backend: str = "auto") -> None:
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"rate must be in [0, 1], got {rate}")
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
        pairs = _checked_pairs(teacher_params, student_params)
        triton = uses_triton(self.backend, (tensor for pair in pairs for tensor in pair))
        if not pairs:
            return
        sizes = (teacher.numel() for teacher, _ in pairs)
        offsets, self._offset = rng_offsets(sizes, self._offset)
        work = [
            (teacher.reshape(-1), student.reshape(-1), offset)
            for (teacher, student), offset in zip(pairs, offsets, strict=True)
        ]
        if triton:
            from . import teacher_kernels

            squares = [teacher_kernels.update(work, self.rate, self.seed, self.step)]
        else:
            squares = [update_flat(*item, self.rate, self.seed, self.step) for item in work]
        self._squares += squares
        for (teacher, _), (teacher_P, _, _) in zip(pairs, work, strict=True):
            if self.rate and not teacher.is_contiguous():  # then teacher_P is a copy
                teacher.copy_(teacher_P.view(teacher.shape))

    def distance(self) -> Tensor:
        """‖θ − φ_before‖₂ of the parts so far, an fp32 scalar on their device."""
        if not self._squares:
            return torch.zeros(())
        return torch.stack(self._squares).sum().sqrt().to(torch.float32)


def _update_(
    teacher_params: Iterable[Tensor],
    student_params: Iterable[Tensor],
    rate: float,
    seed: int = 0,
    step: int = 0,
    backend: str = "auto",
) -> Tensor:
    update = ParameterUpdate(rate, seed=seed, step=step, backend=backend)
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


def _checked_pairs(
    teacher_params: Iterable[Tensor], student_params: Iterable[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """The (teacher, student) tensors to visit: checked, tied ones once, empty ones left out."""
    lists: list[list[Tensor]] = []
    for name, params in (("teacher_params", teacher_params), ("student_params", student_params)):
        if isinstance(params, Tensor):
            raise ValueError(f"{name} must be a list of tensors, got one tensor")
        lists.append(list(params))
    teachers, students = lists
    if len(teachers) != len(students):
        raise ValueError(
            f"teacher_params has {len(teachers)} tensors but student_params has {len(students)}"
        )
    seen: dict[tuple[object, ...], tuple[int, tuple[object, ...]]] = {}
    pairs = []
    for index, (teacher, student) in enumerate(zip(teachers, students, strict=True)):
        for name, tensor in (("teacher_params", teacher), ("student_params", student)):
            if tensor.dtype not in FLOATS:
                raise ValueError(f"{name}[{index}] must be floating point, got {tensor.dtype}")
            if tensor.device != teachers[0].device:
                raise ValueError(
                    f"{name}[{index}] is on {tensor.device}, teacher_params[0] on "
                    f"{teachers[0].device}"
                )
        if teacher.shape != student.shape:
            raise ValueError(
                f"student_params[{index}] has shape {tuple(student.shape)}, "
                f"teacher_params[{index}] has {tuple(teacher.shape)}"
            )
        if teacher.numel() == 0:
            continue
        first, first_student = seen.setdefault(_memory(teacher), (index, _memory(student)))
        if first == index:
            pairs.append((teacher, student))
        elif first_student != _memory(student):
            raise ValueError(
                f"teacher_params[{index}] is tied to teacher_params[{first}], but "
                f"student_params[{index}] is not tied to student_params[{first}]"
            )
    return pairs


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """What two tied tensors have in common."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
