"""Launches are kept from step to step, are made anew when they must be, and can be replayed."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_inputs import DEVICE
from marks import slow
from sodfast_kernels import AdamW
from sodfast_kernels.parameters import adamw, adamw_launch, items
from sodfast_kernels.parameters.items import Table
from torch import Tensor, nn

pytestmark = pytest.mark.triton

SIZES = (64, 33, 16, 300)
STATES = ("8bit", "fp32", "exact")


def parameters(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, n, device=DEVICE).to(dtype)) for n in SIZES]


def gradients(params: list[nn.Parameter], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [
        torch.randn(param.shape, generator=generator).to(param.device, param.dtype)
        for param in params
    ]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    for param, gradient in zip(params, gradients(params, step), strict=True):
        param.grad = gradient


def bits(optimizer: AdamW) -> list[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [value for param in params for value in optimizer.state[param].values()]
    return [*(param.detach() for param in params), *states]


def same(left: AdamW, right: AdamW) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(left), bits(right), strict=True))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The launches that were made, in order."""
    found: list[Any] = []
    prepare = adamw_launch.Launches.__init__

    def noted(self: Any, *arguments: Any) -> None:
        prepare(self, *arguments)
        found.append(self)

    monkeypatch.setattr(adamw_launch.Launches, "__init__", noted)
    return found


def test_steps_with_new_gradients_and_settings_share_their_launches(made):
    params = parameters()
    optimizer = AdamW(params, 1e-2, seed=1, backend="triton")
    other = AdamW(copy.deepcopy(params), 1e-2, seed=1, backend="torch")
    kept = []
    for step in range(4):
        for each in (optimizer, other):
            each.param_groups[0].update(
                lr=1e-2 / (step + 1), seed=step, betas=(0.8, 0.9 + step / 99)
            )
            set_gradients(each.param_groups[0]["params"], step)
            kept.append([param.grad for param in each.param_groups[0]["params"]])  # so: no reuse
            each.step(clip_norm=0.5)
        assert same(optimizer, other)
    assert len(made) == 1


def test_tensors_that_can_be_updated_together_are_one_launch(made):
    params = [nn.Parameter(torch.ones(16 * n, device=DEVICE)) for n in range(1, 6)]
    set_gradients(params, 0)
    AdamW(params, backend="triton").step()
    (launches,) = made
    assert len(launches._squares) == len(launches._updates) == 1


def swap_weight(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    params[1].data = params[1].data.clone()


def shorten(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    """At the same address, as a parameter that is sharded in place."""
    param = params[0]
    param.data = param.data[:32]
    param.grad = None
    state = optimizer.state[param]
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = state[name][:32]


def reinterpret(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    """At the same address, as after a conversion there and back through freed memory."""
    params[0].grad = None
    params[0].data = params[0].data.view(torch.float16)


def swap_moment(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    moment = optimizer.state[params[3]]["exp_avg"]
    moment.data = moment.data.clone()


def replace_moment(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    optimizer.state[params[0]]["exp_avg_sq"] = torch.ones_like(params[0], dtype=torch.float32)


def drop_state(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    del optimizer.state[params[2]]


def replace_count(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    for param in params:
        optimizer.state[param]["step"] = torch.tensor(40)


def take_back_one_count(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    optimizer.state[params[1]]["step"] -= 1


def load(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def move_in_the_stream(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["positions"] = [800, 0, 80, 160]


def add_group(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    added = nn.Parameter(torch.ones(24, dtype=params[0].dtype, device=DEVICE))
    optimizer.add_param_group({"params": [added], "lr": 0.5})
    params.append(added)


@pytest.mark.parametrize(
    "change",
    [
        swap_weight,
        *slow(
            replace_moment,
            add_group,
            shorten,
            reinterpret,
            swap_moment,
            drop_state,
            replace_count,
            take_back_one_count,
            load,
            move_in_the_stream,
        ),
    ],
)
def test_launches_are_made_anew_when_anything_else_has_changed(change: Callable[..., None], made):
    optimizers = []
    for backend in ("triton", "torch"):
        params = parameters()
        optimizer = AdamW(params, 1e-2, state="fp32", seed=3, backend=backend)
        for step in range(4):
            if step == 2:
                change(optimizer, params)
            set_gradients(params, step)
            optimizer.step(clip_norm=0.5)
        optimizers.append(optimizer)
    assert same(*optimizers)
    assert len(made) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda param: setattr(param, "data", param.data.T), "not contiguous"),
        (lambda param: setattr(param, "data", param.data[:4]), "32 elements has a gradient of 64"),
        (lambda param: setattr(param.grad, "data", param.grad.data[:4]), "has a gradient of 32"),
    ],
)
def test_memory_that_no_longer_fits_is_refused_before_it_is_used(change, message):
    """Each at the address that it had in the step before."""
    param = nn.Parameter(torch.ones(8, 8, device=DEVICE))
    param.grad = torch.ones_like(param)
    optimizer = AdamW([param], backend="triton")
    optimizer.step()
    before = param.detach().clone()
    memory = param.data
    change(param)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(memory, before)


def test_a_weight_of_another_dtype_keeps_its_gradient(made):
    """The weight alone has changed, and not its address."""
    results = []
    for backend in ("triton", "torch"):
        param = nn.Parameter(torch.ones(48, dtype=torch.bfloat16, device=DEVICE))
        param.grad = torch.ones_like(param)
        optimizer = AdamW([param], 1e-2, backend=backend)
        optimizer.step()
        param.data = param.data.view(torch.float16)
        optimizer.step()
        results.append(optimizer)
    assert same(*results)
    assert len(made) == 2


@pytest.mark.slow
def test_gradients_may_lie_and_be_anything_that_they_may_be(made):
    """Absent, at an odd address, not contiguous."""
    optimizers = []
    for backend in ("triton", "torch"):
        params = [*parameters(), nn.Parameter(torch.ones(4, 8, device=DEVICE))]
        optimizer = AdamW(params, 1e-2, backend=backend)
        for step in range(8):
            set_gradients(params, step)
            if step in (2, 3):
                params[0].grad = None
            if step in (4, 5):
                buffer = torch.zeros(65, dtype=params[0].dtype, device=DEVICE)
                buffer[1:] = params[0].grad
                params[0].grad = buffer[1:]
            if step in (6, 7):
                params[4].grad = params[4].grad.T.contiguous().T
            optimizer.step(clip_norm=0.5)
        optimizers.append(optimizer)
    assert same(*optimizers)
    assert len(made) == 4  # all aligned, one absent, one odd, all aligned


def test_launches_keep_neither_weights_nor_moments_alive():
    params = parameters()
    optimizer = AdamW(params, state="fp32", backend="triton")
    set_gradients(params, 0)
    optimizer.step()
    held = [params[0], params[0].grad, optimizer.state[params[0]]["exp_avg"]]
    alive = [weakref.ref(value.untyped_storage()) for value in held]
    assert None not in [storage() for storage in alive]
    params[0].data, params[0].grad = torch.zeros_like(params[0]), None
    optimizer.state[params[0]]["exp_avg"] = torch.zeros_like(held.pop())
    held.clear()
    gc.collect()
    assert [storage() for storage in alive] == [None] * 3


def test_the_counts_of_steps_are_tensors_of_their_own_to_whoever_saves_them():
    params = parameters()
    optimizer = AdamW(params, backend="triton")
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert [int(state["step"]) for state in saved["state"].values()] == [2] * len(params)
    optimizer.state[params[0]]["step"] -= 1
    assert [int(optimizer.state[param]["step"]) for param in params] == [1, 2, 2, 2]


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """A stand-in for a CUDA graph: it records the launches that are made while `recording`."""
    recorded: list[Callable[[], None]] = []
    launch = Table.launch

    def note(table: Table, kernel: Any, **arguments: Any) -> None:
        if adamw.is_capturing(table.device):
            recorded.append(lambda: launch(table, kernel, **arguments))
        else:
            launch(table, kernel, **arguments)

    monkeypatch.setattr(Table, "launch", note)
    return recorded


def capture(monkeypatch: pytest.MonkeyPatch, optimizer: AdamW, norm: Tensor) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(adamw, "is_capturing", lambda device: True)
        optimizer.step(norm=norm)


@pytest.mark.parametrize("state", ["exact", *slow("fp32", "8bit")])
def test_a_recorded_step_reads_what_advance_writes(state, graph, monkeypatch):
    """As in a CUDA graph, whose launches have the same arguments at every replay."""
    norm = torch.ones((), device=DEVICE)
    eager, replayed = (
        AdamW(parameters(), 1e-2, weight_decay=0.1, state=state, seed=2**63 + 5, backend="triton")
        for _ in range(2)
    )
    for optimizer in (eager, replayed):
        set_gradients(optimizer.param_groups[0]["params"], 0)
        optimizer.step(norm=norm)
    before = [value.clone() for value in bits(replayed)]
    capture(monkeypatch, replayed, norm)
    assert all(torch.equal(a, b) for a, b in zip(bits(replayed), before, strict=True))
    assert graph
    static = [param.grad for param in replayed.param_groups[0]["params"]]
    for step in range(1, 4):
        for optimizer in (eager, replayed):
            optimizer.param_groups[0]["lr"] = 1e-2 / step
        set_gradients(eager.param_groups[0]["params"], step)
        eager.step(norm=norm)
        for gradient, value in zip(static, gradients(static, step), strict=True):
            gradient.copy_(value)
        replayed.advance()
        for run in graph:
            run()
        assert same(eager, replayed)


def test_advance_refuses_what_no_graph_holds(graph, monkeypatch):
    params, norm = parameters(), torch.ones((), device=DEVICE)
    optimizer = AdamW(params, backend="triton")
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="make the same step once"):
        capture(monkeypatch, optimizer, norm)
    assert not optimizer.state
    optimizer.step()
    with pytest.raises(RuntimeError, match="no CUDA graph holds"):
        optimizer.advance()
    capture(monkeypatch, optimizer, norm)
    optimizer.advance()
    static = [param.grad for param in params]
    set_gradients(params, 1)
    with pytest.raises(RuntimeError, match="no CUDA graph holds"):
        optimizer.advance()
    with pytest.raises(RuntimeError, match="gradients elsewhere"):
        capture(monkeypatch, optimizer, norm)
    for param, gradient in zip(params, static, strict=True):
        param.grad = gradient
    count = int(optimizer.state[params[0]]["step"])
    optimizer.advance()
    assert int(optimizer.state[params[0]]["step"]) == count + 1
    params[0].data = params[0].data.clone()
    with pytest.raises(RuntimeError, match="no CUDA graph holds"):
        optimizer.advance()


def test_the_pytorch_path_has_nothing_to_capture(monkeypatch):
    params = parameters()
    optimizer = AdamW(params, backend="torch")
    set_gradients(params, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="on the Triton path"):
        capture(monkeypatch, optimizer, torch.ones((), device=DEVICE))
    with pytest.raises(RuntimeError, match="no CUDA graph holds"):
        optimizer.advance()


@pytest.mark.gpu
@pytest.mark.parametrize("state", STATES)
def test_three_replays_of_a_cuda_graph_are_three_steps(state):
    eager, replayed = (AdamW(parameters(), 1e-2, state=state, seed=7) for _ in range(2))
    for optimizer in (eager, replayed):
        set_gradients(optimizer.param_groups[0]["params"], 0)
        optimizer.step(clip_norm=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = replayed.step(clip_norm=0.5)
    assert items._CAPTURED
    static = [param.grad for param in replayed.param_groups[0]["params"]]
    for step in range(1, 4):
        for optimizer in (eager, replayed):
            optimizer.param_groups[0]["lr"] = 1e-2 / step
        set_gradients(eager.param_groups[0]["params"], step)
        expected = eager.step(clip_norm=0.5)
        for gradient, value in zip(static, gradients(static, step), strict=True):
            gradient.copy_(value)
        replayed.advance()
        graph.replay()
        assert torch.equal(norm, expected) and same(eager, replayed)
