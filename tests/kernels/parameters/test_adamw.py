"""AdamW: against torch's, exact masters, what stochastic rounding keeps, clipping, resuming."""

import copy

import pytest
import torch
from kernel_inputs import DEVICE
from sodfast_kernels.parameters import adamw
from sodfast_kernels.parameters.adamw import AdamW
from sodfast_kernels.parameters.formats import join
from sodfast_kernels.philox import rng_offsets
from torch import nn

SHAPES = [(7, 33), (256,), (1,), (300, 5)]


def parameters(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter((0.02 * torch.randn(s, generator=generator)).bfloat16().to(DEVICE, dtype))
        for s in SHAPES
    ]


def set_gradients(params, step: int) -> None:
    """Values that bf16 holds, of very different sizes, the same for every dtype."""
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        size = torch.exp(2 * torch.randn(param.shape, generator=generator)) * 1e-3
        gradient = (torch.randn(param.shape, generator=generator) * size).bfloat16()
        param.grad = gradient.to(DEVICE, param.dtype)


def train(params, optimizer, steps: int, first: int = 0, **arguments) -> list[torch.Tensor]:
    norms = []
    for step in range(first, first + steps):
        set_gradients(params, step)
        norms.append(optimizer.step(**arguments))
    return norms


def same(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("state", ["fp32", "exact"])
def test_fp32_parameters_follow_torch(state):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    arguments = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = AdamW(ours, **arguments, state=state)
    reference = torch.optim.AdamW(theirs, **arguments)
    for step in range(20):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        expected = nn.utils.clip_grad_norm_(theirs, 0.05)
        assert optimizer.step(clip_norm=0.05).item() == pytest.approx(expected.item(), rel=1e-6)
        reference.step()
    for own, other in zip(ours, theirs, strict=True):
        assert torch.allclose(own, other, rtol=1e-5, atol=1e-8)


def test_learning_rate_groups_and_frozen_parameters_are_respected():
    params = parameters(torch.float32)
    optimizer = AdamW(
        [{"params": params[:1], "lr": 0.0}, {"params": params[1:], "weight_decay": 0.0}],
        1e-2,
        state="fp32",
    )
    before = copy.deepcopy(params)
    set_gradients(params, 0)
    params[2].grad = None
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert moved == [False, True, False, True]
    # The first step is lr·sign(g) whatever the size of g, as far as ε lets it.
    big = params[3].grad.abs() > 1e-5
    step = (before[3] - params[3])[big]
    assert torch.allclose(step, 1e-2 * params[3].grad[big].sign(), rtol=2e-3)


def test_the_exact_master_is_fp32_training_bit_for_bit():
    full, half = parameters(torch.float32), parameters(torch.bfloat16)
    reference, optimizer = AdamW(full, 1e-3, state="fp32"), AdamW(half, 1e-3, state="exact")
    for step in range(50):
        for params, opt in ((full, reference), (half, optimizer)):
            set_gradients(params, step)
            opt.step(clip_norm=0.5)
        for wide, narrow in zip(full, half, strict=True):
            master = join(narrow.detach(), optimizer.state[narrow]["remainder"])
            assert torch.equal(master, wide)
            assert ((narrow.double() - wide).abs() <= (wide.bfloat16() - wide).abs()).all()


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-6, 1e-5])
def test_bf16_weights_keep_the_drift_of_the_fp64_trajectory(lr):
    """200 steps: rounding to nearest loses nearly everything, the three states do not."""
    count = 1 << 16
    generator = torch.Generator().manual_seed(0)
    start = (0.02 * torch.randn(count, generator=generator)).to(DEVICE).bfloat16()
    signal = torch.randn(count, generator=generator)
    size = torch.exp(2 * torch.randn(count, generator=generator)) * 1e-4

    exact = nn.Parameter(start.double())
    nearest = nn.Parameter(start.clone())
    optimizers = [torch.optim.AdamW([p], lr) for p in (exact, nearest)]
    ours = {state: nn.Parameter(start.clone()) for state in ("fp32", "8bit", "exact")}
    optimizers += [AdamW([param], lr, state=state) for state, param in ours.items()]
    for _ in range(200):
        gradient = ((signal + torch.randn(count, generator=generator)) * size).bfloat16()
        for param in (exact, nearest, *ours.values()):
            param.grad = gradient.to(DEVICE, param.dtype)
        for optimizer in optimizers:
            optimizer.step()

    drift = exact.detach() - start.double()

    def kept(param: torch.Tensor) -> float:
        made = param.detach().double() - start.double()
        return (torch.dot(made, drift) / drift.square().sum()).item()

    assert kept(nearest) < 0.2
    assert 0.99 < kept(ours["fp32"]) < 1.01
    assert 0.99 < kept(ours["8bit"]) < 1.02
    master = join(ours["exact"].detach(), optimizers[-1].state[ours["exact"]]["remainder"])
    assert 0.9999 < kept(master) < 1.0001


def regression_loss(make_optimizer, seed: int, dtype: torch.dtype) -> float:
    """Mean loss of the last steps of a small network learning another one's function."""
    torch.manual_seed(1)
    target = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)).to(DEVICE)
    torch.manual_seed(10 + seed)
    network = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)).to(DEVICE, dtype)
    optimizer = make_optimizer(network.parameters())
    losses = []
    for _ in range(150):
        inputs = torch.randn(64, 16).to(DEVICE)
        with torch.no_grad():
            targets = target(inputs)
        loss = (network(inputs.to(dtype)).float() - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-30:]) / 30


@pytest.mark.slow
def test_8bit_tracks_torch_within_the_noise_of_the_seed():
    theirs, ours = [], []
    for seed in range(3):
        theirs.append(regression_loss(lambda p: torch.optim.AdamW(p, 3e-3), seed, torch.float32))
        ours.append(regression_loss(lambda p: AdamW(p, 3e-3, state="8bit"), seed, torch.float32))
    spread = max(theirs) - min(theirs)
    assert all(abs(o - t) < spread / 4 for o, t in zip(ours, theirs, strict=True))
    assert max(theirs) < 0.01  # the network did learn: it starts at 0.18


COMBINATIONS = [
    (state, dtype)
    for state in ("8bit", "fp32", "exact")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if (state, dtype) != ("exact", torch.float16)
]


@pytest.mark.parametrize(("state", "dtype"), COMBINATIONS)
def test_a_resumed_run_gives_the_same_bits(state, dtype):
    straight, stopped = parameters(dtype), parameters(dtype)
    optimizer = AdamW(straight, 1e-3, state=state, seed=5)
    train(straight, optimizer, 6)
    first = AdamW(stopped, 1e-3, state=state, seed=5)
    train(stopped, first, 3)
    second = AdamW(stopped, 7.0, state=state)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(stopped, second, 3, first=3)
    assert same(straight, stopped)
    for one, other in zip(straight, stopped, strict=True):
        assert same(optimizer.state[one].values(), second.state[other].values())
    # The state is plain tensors, one key each, so that any format can store it.
    assert all(
        isinstance(value, torch.Tensor)
        for entry in second.state_dict()["state"].values()
        for value in entry.values()
    )


def test_a_foreign_state_is_refused():
    params = parameters(torch.bfloat16)
    optimizer = AdamW(params, 1e-3, state="fp32")
    train(params, optimizer, 1)
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="state_dict: entry 0 has"):
        wrong = copy.deepcopy(saved)
        wrong["param_groups"][0]["state"] = "8bit"
        AdamW(params, 1e-3).load_state_dict(wrong)
    with pytest.raises(ValueError, match="state_dict: exp_avg of entry 1"):
        wrong = copy.deepcopy(saved)
        wrong["state"][1]["exp_avg"] = wrong["state"][1]["exp_avg"].bfloat16()
        AdamW(params, 1e-3).load_state_dict(wrong)


def test_rounding_is_keyed_by_the_seed_and_the_chunks_do_not_matter(monkeypatch):
    def run(seed):
        params = parameters(torch.bfloat16)
        train(params, AdamW(params, 1e-5, state="8bit", seed=seed), 3)
        return params

    base = run(1)
    assert same(base, run(1)) and not same(base, run(2))
    monkeypatch.setattr(adamw, "CHUNK", 512)
    assert same(base, run(1))


@pytest.mark.parametrize("state", ["8bit", "fp32", "exact"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_norm(state, bad):
    params = parameters(torch.bfloat16)
    optimizer = AdamW(params, 1e-3, state=state)
    train(params, optimizer, 2)
    before = copy.deepcopy([p.detach() for p in params])
    kept = copy.deepcopy([optimizer.state[p]["exp_avg"] for p in params])
    set_gradients(params, 2)
    params[1].grad[7] = bad
    norm = optimizer.step(clip_norm=1.0)
    assert not norm.isfinite()
    assert same(before, params) and same(kept, [optimizer.state[p]["exp_avg"] for p in params])


def test_non_contiguous_gradients_count_as_their_values():
    straight, turned = [nn.Parameter(torch.ones(8, 4, device=DEVICE)) for _ in range(2)]
    straight.grad = torch.arange(32.0, device=DEVICE).view(8, 4) / 100
    turned.grad = straight.grad.T.contiguous().T
    for param in (straight, turned):
        AdamW([param], 0.1).step()
    assert torch.equal(straight, turned)


def test_in_place_updates_are_seen_by_autograd():
    weight = nn.Parameter(torch.ones(3, device=DEVICE))
    loss = (weight * weight).sum()
    weight.grad = torch.ones_like(weight)
    AdamW([weight], 0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_memory_of_the_states():
    def state_bytes(state):
        param = nn.Parameter(torch.zeros(1 << 16, dtype=torch.bfloat16, device=DEVICE))
        param.grad = torch.zeros_like(param)
        optimizer = AdamW([param], state=state)
        optimizer.step()
        tensors = [value for name, value in optimizer.state[param].items() if name != "step"]
        return sum(t.numel() * t.itemsize for t in tensors) / param.numel()

    assert state_bytes("8bit") == 2 + 2 / 256
    assert state_bytes("fp32") == 8
    assert state_bytes("exact") == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"eps": float("nan")}, "eps must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"state": "16bit"}, "state must be"),
        ({"backend": "cuda"}, "backend must be"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.ones(2))], **arguments)


def test_parameters_and_calls_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="params"):
        AdamW([nn.Parameter(torch.ones(2, dtype=torch.float64))])
    with pytest.raises(ValueError, match="params"):
        AdamW([nn.Parameter(torch.ones(2, dtype=torch.float16))], state="exact")
    param = nn.Parameter(torch.ones(2))
    optimizer = AdamW([param])
    assert optimizer.step().item() == 0.0  # no gradient, nothing to do
    param.grad = torch.ones(2)
    with pytest.raises(ValueError, match="clip_norm"):
        optimizer.step(clip_norm=0.0)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)
    turned = nn.Parameter(torch.ones(4, 2).T)
    turned.grad = torch.ones(2, 4)
    with pytest.raises(ValueError, match="not contiguous"):
        AdamW([turned]).step()
    shortened = nn.Parameter(torch.ones(8))
    shortened.grad = torch.ones(8)
    shortened.data = shortened.data[:4]
    with pytest.raises(ValueError, match="4 elements has a gradient of 8"):
        AdamW([shortened]).step()
    sparse = nn.Parameter(torch.ones(3))
    sparse.grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        AdamW([sparse]).step()


@pytest.mark.parametrize("state", ["8bit", "fp32", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_stepped_as_in_the_whole(state, dtype):
    """Cut at blocks, given their positions and the norm of all gradients: bit for bit."""
    whole = [nn.Parameter(torch.linspace(-1, 1, n).to(DEVICE, dtype)) for n in (1000, 31)]
    set_gradients(whole, 0)
    cuts = [(0, slice(0, 512)), (0, slice(512, 1000)), (1, slice(0, 31))]
    parts = [nn.Parameter(whole[index].detach()[cut].clone()) for index, cut in cuts]
    for part, (index, cut) in zip(parts, cuts, strict=True):
        part.grad = whole[index].grad[cut].clone()
    positions, _ = rng_offsets([1000, 31])
    optimizer = AdamW(whole, 0.1, state=state, seed=3)
    norm = optimizer.step(clip_norm=0.01)
    own = [positions[index] + cut.start for index, cut in cuts]
    for part, position in zip(parts, own, strict=True):  # each by an optimizer of its own
        group = {"params": [part], "positions": [position]}
        stepped = AdamW([group], 0.1, state=state, seed=3)
        assert stepped.step(clip_norm=0.01, norm=norm) is norm
    assert torch.equal(torch.cat([parts[0], parts[1]]), whole[0])
    assert torch.equal(parts[2], whole[1])


@pytest.mark.parametrize("positions", [[0], [0, 4], [0, 8, 16]])
def test_positions_that_do_not_fit_are_refused(positions):
    params = [nn.Parameter(torch.zeros(8)) for _ in range(2)]
    with pytest.raises(ValueError, match="positions must be a multiple of 8 for each"):
        AdamW([{"params": params, "positions": positions}])
