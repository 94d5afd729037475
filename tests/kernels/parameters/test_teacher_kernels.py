"""The Triton kernel of copy, average and distance gives the bits of the PyTorch path."""

import pytest
import torch
from kernel_inputs import DEVICE, FLOATS, HUGE_SEED, HUGE_STEP, clones, same_bits, tensors
from marks import slow
from sodfast_kernels import ParameterUpdate, copy_teacher_, ema_update_, parameter_distance
from sodfast_kernels.parameters import items
from sodfast_kernels.parameters import teacher as teacher_module

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("student_dtype", [torch.bfloat16, *slow(torch.float32, torch.float16)])
@pytest.mark.parametrize("teacher_dtype", FLOATS)
@pytest.mark.parametrize("rate", [0.04, *slow(0.0, 1.0)])
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


@pytest.fixture
def tables(monkeypatch):
    """The tables that were made, by plans that no earlier test has left for the same addresses."""
    teacher_module._plan.cache_clear()
    made = []
    make = items.Table.__init__

    def noted(self, *arguments):
        make(self, *arguments)
        made.append(self)

    monkeypatch.setattr(items.Table, "__init__", noted)
    return made


def test_updates_of_the_same_tensors_share_their_table(tables):
    teacher, student = (
        tensors(0, torch.float32, [(64,)] * 5),
        tensors(1, torch.bfloat16, [(64,)] * 5),
    )
    for step in range(3):
        ema_update_(teacher, iter(student), 0.1, step=step, backend="triton")
        copy_teacher_([value.detach() for value in teacher], student, backend="triton")
        parameter_distance(teacher, student, backend="triton")
    assert len(tables) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.clone(),
        lambda data: data[:2],
        lambda data: data.view(torch.bfloat16)[:, :3],
        lambda data: data.T,
    ],
)
def test_memory_that_has_changed_under_a_tensor_is_found(change, tables):
    """Swapped, or at the same address but shorter, of another dtype, with other strides."""
    results = []
    for backend in ("torch", "triton"):
        teacher, student = torch.zeros(4, 6, device=DEVICE), torch.ones(4, 6, device=DEVICE)
        kept = teacher.data
        ema_update_([teacher], [student], 0.5, backend=backend)
        teacher.data, student.data = change(teacher.data), change(student.data)
        ema_update_([teacher], [student], 0.5, backend=backend)
        results.append((teacher.clone(), kept.clone()))
    assert all(map(torch.equal, *results))
    assert len(tables) == 2


def test_a_step_in_memory_gives_the_bits_of_the_number():
    student = tensors(1, torch.float32)
    results = []
    for step in (HUGE_STEP, torch.tensor(HUGE_STEP, device=DEVICE)):
        for backend in ("torch", "triton"):
            teacher = tensors(0, torch.bfloat16)
            ema_update_(teacher, student, 0.04, seed=HUGE_SEED, step=step, backend=backend)
            results.append(teacher)
    assert all(same_bits(result, results[0]) for result in results)


def test_the_kernel_reads_the_step_that_memory_holds_when_it_runs(monkeypatch):
    """As in a CUDA graph, whose launches have the same arguments at every replay."""
    recorded = []
    teacher, student = tensors(0, torch.bfloat16), tensors(1, torch.bfloat16)
    expected, step = clones(teacher), torch.tensor(3, device=DEVICE)
    launch = items.Table.launch
    with monkeypatch.context() as patch:
        patch.setattr(items.Table, "launch", lambda *a, **k: recorded.append((a, k)))
        ema_update_(teacher, student, 0.04, seed=1, step=step, backend="triton")
    for number in range(4, 7):
        step += 1
        for arguments, named in recorded:
            launch(*arguments, **named)
        ema_update_(expected, student, 0.04, seed=1, step=number, backend="torch")
        assert same_bits(teacher, expected)


@pytest.mark.parametrize(
    "step", [torch.tensor(1.0), torch.tensor([1]), torch.tensor(1, dtype=torch.int32)]
)
def test_a_step_that_is_no_number_of_a_step_is_refused(step):
    with pytest.raises(ValueError, match="step must be an int or an int64 scalar"):
        ParameterUpdate(0.1, step=step)


def test_a_step_elsewhere_is_refused():
    update = ParameterUpdate(0.1, step=torch.tensor(1, device="meta"), backend="triton")
    with pytest.raises(ValueError, match="step is on meta"):
        update.add([torch.ones(2, device=DEVICE)], [torch.ones(2, device=DEVICE)])


@pytest.mark.gpu
def test_three_replays_of_a_cuda_graph_are_three_averages():
    teacher, student = tensors(0, torch.bfloat16), tensors(1, torch.bfloat16)
    expected, step = clones(teacher), torch.zeros((), dtype=torch.int64, device="cuda")
    ema_update_(teacher, student, 0.04, seed=1, step=step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step += 1
        ema_update_(teacher, student, 0.04, seed=1, step=step)
    for _ in range(3):
        graph.replay()
    for number in range(4):
        ema_update_(expected, student, 0.04, seed=1, step=number)
    assert step.item() == 3 and same_bits(teacher, expected)


@pytest.mark.gpu
def test_an_update_that_was_never_made_is_not_captured():
    # New tensors may lie where those of an earlier test lay, whose plan would serve them.
    teacher_module._plan.cache_clear()
    teacher, student = tensors(0, torch.bfloat16), tensors(1, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="once before the capture"), torch.cuda.graph(graph):
        copy_teacher_(teacher, student)
