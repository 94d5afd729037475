"""Teacher copy, moving average and distance: values, key, tied tensors, errors."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import DEVICE, FLOATS, clones
from sodfast_kernels import (
    ParameterUpdate,
    copy_teacher_,
    ema_update_,
    parameter_distance,
)


def tensors(seed: int, dtype: torch.dtype, shapes=((3, 5), (17,), (), (0, 4), (8, 8))):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def oracle_distance(teacher, student) -> float:
    squares = [
        (s.double() - t.double()).square().sum() for t, s in zip(teacher, student, strict=True)
    ]
    return torch.stack(squares).sum().sqrt().item()


@pytest.mark.parametrize("student_dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("teacher_dtype", [*FLOATS, torch.float64])
def test_copy_writes_the_student_and_returns_the_distance(teacher_dtype, student_dtype):
    teacher, student = tensors(0, teacher_dtype), tensors(1, student_dtype)
    expected = oracle_distance(teacher, student)
    before = parameter_distance(teacher, student)
    shock = copy_teacher_(teacher, student)
    assert shock.dtype == torch.float32 and shock.shape == ()
    assert shock.item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(shock, before)
    for t, s in zip(teacher, student, strict=True):
        assert torch.equal(t, s.to(teacher_dtype))


@pytest.mark.parametrize("student_dtype", FLOATS)
@pytest.mark.parametrize("teacher_dtype", FLOATS)
@pytest.mark.parametrize("rate", [0.04, 0.5, 0.999])
def test_ema_is_the_weighted_mean(teacher_dtype, student_dtype, rate):
    teacher, student = tensors(2, teacher_dtype), tensors(3, student_dtype)
    expected = [
        (1 - rate) * t.double() + rate * s.double() for t, s in zip(teacher, student, strict=True)
    ]
    distance = parameter_distance(teacher, student)
    assert torch.equal(ema_update_(teacher, student, rate, seed=5, step=9), distance)
    step_size = {torch.float32: 2e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}[teacher_dtype]
    for t, want in zip(teacher, expected, strict=True):
        assert ((t.double() - want).abs() <= step_size * want.abs() + 1e-6).all()


@pytest.mark.parametrize("teacher_dtype", FLOATS)
def test_rate_is_exact_at_both_ends(teacher_dtype):
    teacher, student = tensors(4, teacher_dtype), tensors(5, torch.bfloat16)
    untouched = clones(teacher)
    ema_update_(teacher, student, 0.0)
    assert all(torch.equal(t, u) for t, u in zip(teacher, untouched, strict=True))
    ema_update_(teacher, student, 1.0)
    assert all(torch.equal(t, s.to(t.dtype)) for t, s in zip(teacher, student, strict=True))


@settings(max_examples=50)
@given(rate=st.floats(0, 1), seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**40))
def test_equal_parameters_are_a_fixed_point(rate, seed, step):
    teacher = tensors(6, torch.bfloat16)
    student = clones(teacher)
    assert ema_update_(teacher, student, rate, seed=seed, step=step) == 0
    assert all(torch.equal(t, s) for t, s in zip(teacher, student, strict=True))


def test_rounding_is_unbiased_and_keyed_by_seed_step_and_place():
    def moved(**key):
        teacher = [torch.ones(40_000, dtype=torch.bfloat16, device=DEVICE)]
        ema_update_(teacher, [torch.full((40_000,), 2.0, device=DEVICE)], 0.001, **key)
        return teacher[0]

    base = moved(seed=1, step=1)
    # One spacing is 1/128: one element in 7.8 moves, the mean moves by the rate.
    assert base.double().mean().item() == pytest.approx(1.001, abs=5e-5)
    assert torch.equal(base, moved(seed=1, step=1))
    assert not torch.equal(base, moved(seed=2, step=1))
    assert not torch.equal(base, moved(seed=1, step=2))
    # The key is the place of the element, not how the work is cut.
    teacher = [part.clone() for part in torch.ones_like(base).split([8, 39_992])]
    ema_update_(teacher, [torch.full_like(t, 2.0) for t in teacher], 0.001, seed=1, step=1)
    assert torch.equal(base, torch.cat(teacher))


def test_chunks_do_not_change_the_result(monkeypatch):
    results = []
    for chunk in (1 << 20, 64):
        monkeypatch.setattr("sodfast_kernels.parameters.teacher.CHUNK", chunk)
        teacher, student = (
            [t.bfloat16() for t in tensors(7, torch.float32, [(1001,)])],
            [torch.linspace(-1, 1, 1001, device=DEVICE)],
        )
        results.append((ema_update_(teacher, student, 0.3, seed=2), teacher[0]))
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=1e-7)
    assert torch.equal(results[0][1], results[1][1])


@settings(max_examples=40)
@given(
    cuts=st.lists(st.integers(0, 5), max_size=4).map(sorted),
    dtype=st.sampled_from(FLOATS),
    rate=st.sampled_from([0.0, 0.04, 1.0]),
)
def test_an_update_in_parts_is_the_update(cuts, dtype, rate):
    whole, student = tensors(8, dtype), tensors(9, torch.float32)
    teacher, update = clones(whole), ParameterUpdate(rate, seed=4, step=6)
    for start, stop in itertools.pairwise([0, *cuts, 5]):
        update.add(teacher[start:stop], student[start:stop])
    assert update.distance().equal(ema_update_(whole, student, rate, seed=4, step=6))
    assert all(torch.equal(t, w) for t, w in zip(teacher, whole, strict=True))


def test_tied_tensors_count_and_move_once():
    head, student_head = torch.zeros(4, 6, device=DEVICE), torch.ones(4, 6, device=DEVICE)
    distance = ema_update_([head, head.view(4, 6)], [student_head, student_head], 0.5)
    assert distance.item() == pytest.approx(24**0.5)
    assert (head == 0.5).all()


def test_two_rows_of_one_buffer_are_not_tied():
    flat, student = torch.zeros(2, 8, device=DEVICE), torch.ones(2, 8, device=DEVICE)
    distance = copy_teacher_(list(flat), list(student))
    assert distance.item() == pytest.approx(4.0) and flat.sum() == 16


def test_a_teacher_tie_the_student_lacks_is_refused():
    tied = torch.zeros(3)
    with pytest.raises(ValueError, match=r"teacher_params\[1\] is tied"):
        copy_teacher_([tied, tied], [torch.ones(3), torch.ones(3)])


def test_non_contiguous_tensors_are_updated_in_place():
    storage = torch.zeros(6, 4, dtype=torch.bfloat16, device=DEVICE)
    teacher, student = storage.T, torch.arange(24.0, device=DEVICE).view(4, 6)
    same, other = storage.clone().view(4, 6), student.T.contiguous().T
    for _ in range(2):
        ema_update_([teacher], [student], 0.1, seed=3)
        ema_update_([same], [other], 0.1, seed=3)
    assert torch.equal(teacher, same) and torch.equal(storage, same.T)


def test_parameters_that_require_gradients_stay_leaves():
    teacher = torch.nn.Linear(3, 2, device=DEVICE)
    student = torch.nn.Linear(3, 2, device=DEVICE)
    copy_teacher_(teacher.parameters(), student.parameters())
    ema_update_(teacher.parameters(), student.parameters(), 0.5)
    assert teacher.weight.is_leaf and teacher.weight.grad_fn is None
    assert torch.equal(teacher.weight, student.weight)


@pytest.mark.parametrize("teacher_dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_student_never_becomes_a_number(teacher_dtype, bad):
    teacher = torch.ones(9, dtype=teacher_dtype, device=DEVICE)
    student = torch.full((9,), 0.5, device=DEVICE)
    student[4] = bad
    distance = ema_update_([teacher], [student], 0.04)
    assert not teacher[4].isfinite() and not distance.isfinite()
    assert teacher[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()
    copy_teacher_([teacher], [student])
    assert torch.equal(teacher.isnan(), student.isnan())


def test_no_parameters_are_at_distance_zero():
    assert copy_teacher_([], []).item() == 0.0


@pytest.mark.parametrize(
    ("teacher", "student", "rate", "message"),
    [
        ([torch.ones(2)], [], 0.5, "student_params has 0"),
        ([torch.ones(2)], [torch.ones(3)], 0.5, r"student_params\[0\] has shape"),
        ([torch.ones(2)], [torch.ones(2, device="meta")], 0.5, r"student_params\[0\] is on meta"),
        ([torch.ones(2, dtype=torch.int32)], [torch.ones(2)], 0.5, r"teacher_params\[0\] must be"),
        (torch.ones(2), [torch.ones(2)], 0.5, "teacher_params must be a list"),
        ([torch.ones(2)], [torch.ones(2)], 1.5, "rate must be in"),
        ([torch.ones(2)], [torch.ones(2)], float("nan"), "rate must be in"),
    ],
)
def test_arguments_that_do_not_fit_are_named(teacher, student, rate, message):
    with pytest.raises(ValueError, match=message):
        ema_update_(teacher, student, rate)


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-6, 1e-5])
def test_a_bf16_teacher_follows_the_exact_average(lr):
    """200 steps of a slowly moving student: ≥ 99 % of the fp64 teacher's drift is kept."""
    count, rate = 1 << 17, 0.04
    generator = torch.Generator().manual_seed(0)
    start = (0.02 * torch.randn(count, generator=generator)).to(DEVICE).bfloat16()
    direction = torch.randn(count, generator=generator, dtype=torch.float64).sign()
    direction = direction.to(DEVICE)
    stochastic, nearest, exact = [start.clone()], start.clone(), start.double()
    for step in range(200):
        student = start.double() + lr * (step + 1) * direction
        exact += rate * (student - exact)
        nearest = (nearest.float() + rate * (student.float() - nearest.float())).bfloat16()
        ema_update_(stochastic, [student.float()], rate, step=step)

    def kept(teacher):
        """The part of the exact drift that the teacher has made."""
        drift = exact - start.double()
        return (torch.dot(teacher.double() - start.double(), drift) / drift.square().sum()).item()

    assert 0.99 < kept(stochastic[0]) < 1.01
    assert kept(nearest) < 0.7


def test_a_part_at_its_position_is_rounded_as_in_the_whole():
    student = torch.linspace(-1, 1, 1000, device=DEVICE)
    whole = student.flip(0).bfloat16()
    halves = [whole[:496].clone(), whole[496:].clone()]
    distance = ema_update_([whole], [student], 0.3, seed=5, step=2)
    squares = 0.0
    for half, part, position in zip(halves, (student[:496], student[496:]), (0, 496), strict=True):
        update = ParameterUpdate(0.3, seed=5, step=2)
        update.add([half], [part], position)
        squares += update.distance().double().square()
    assert torch.equal(torch.cat(halves), whole)
    assert squares.sqrt().float().item() == pytest.approx(distance.item(), rel=1e-6)
    with pytest.raises(ValueError, match="multiple of 8"):
        ParameterUpdate(0.3).add([whole], [student], 4)
