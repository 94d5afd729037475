"""The Triton kernel of copy, average and distance gives the bits of the PyTorch path."""

import pytest
import torch
from kernel_inputs import DEVICE, FLOATS, HUGE_SEED, HUGE_STEP, clones, same_bits, tensors
from sodfast_kernels import copy_teacher_, ema_update_, parameter_distance
from sodfast_kernels.parameters import items

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("student_dtype", FLOATS)
@pytest.mark.parametrize("teacher_dtype", FLOATS)
@pytest.mark.parametrize("rate", [0.0, 1.0, 0.04])
def test_update_gives_the_bits_of_the_pytorch_path(teacher_dtype, student_dtype, rate):
    student = tensors(1, student_dtype)
    start = tensors(0, teacher_dtype)
    results = []
    for backend in ("torch", "triton", "triton"):
        teacher = clones(start)
        key = {"seed": HUGE_SEED, "step": HUGE_STEP, "backend": backend}
        results.append((teacher, ema_update_(teacher, student, rate, **key)))
    for teacher, _ in results[1:]:
        assert same_bits(teacher, results[0][0])
    assert all(norm.isnan() for _, norm in results)  # the NaN among the values


@pytest.mark.parametrize("dtype", FLOATS)
def test_norms_agree_and_are_the_same_twice(dtype):
    teacher = [value.nan_to_num(1, 1, 1) for value in tensors(0, dtype)]
    student = [value.nan_to_num(1, 1, 1) for value in tensors(1, dtype)]
    expected = parameter_distance(teacher, student, backend="torch")
    first = parameter_distance(teacher, student, backend="triton")
    assert first.item() == pytest.approx(expected.item(), rel=2e-7)
    assert torch.equal(first, parameter_distance(teacher, student, backend="triton"))
    assert torch.equal(first, ema_update_(clones(teacher), student, 0.1, backend="triton"))
    assert torch.equal(first, copy_teacher_(clones(teacher), student, backend="triton"))


def test_tensors_of_several_programs_and_unaligned_views(monkeypatch):
    monkeypatch.setitem(items.LAUNCH, "BLOCK_SIZE", 256)
    monkeypatch.setitem(items.LAUNCH, "CHUNK", 512)
    monkeypatch.setattr(items, "CHUNK", 512)
    student_buffer = torch.randn(4097, device=DEVICE)
    start = torch.randn(4097, device=DEVICE).bfloat16()
    results = []
    for backend in ("torch", "triton"):
        buffer = start.clone()
        views = [buffer[1:1601], buffer[1601:4097], buffer[:1]]
        students = [student_buffer[1:1601], student_buffer[1601:4097], student_buffer[:1]]
        norm = ema_update_(views, students, 0.3, seed=1, backend=backend)
        results.append((buffer, norm))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].item() == pytest.approx(results[1][1].item(), rel=2e-7)


def test_non_contiguous_and_tied_tensors():
    student = torch.randn(8, 6, device=DEVICE)
    results = []
    for backend in ("torch", "triton"):
        storage = torch.ones(6, 8, device=DEVICE)
        norm = ema_update_([storage.T, storage.T], [student, student], 0.5, backend=backend)
        results.append((storage, norm))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].item() == pytest.approx(results[1][1].item(), rel=2e-7)
