"""Which AdamW a configuration names, and one clipped update: what moves, what is kept, what never
happens."""

from copy import deepcopy

import pytest
import sodfast_kernels
import torch
from marks import slow
from sodfast_kernels.parameters.formats import join
from sodfast_kernels.philox import random_bits
from torch import Tensor, nn

from sodfast.config import OptimizerConfig, load_config
from sodfast.errors import RunFailed, UsageError
from sodfast.optimizer import build_optimizer, learning_rate, update
from sodfast.parallel.fsdp import Weights

FUSED = ("8bit", "fp32", "exact")


def network(dtype: str, size: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(size, size), nn.Linear(size, size, bias=False)).to(
        getattr(torch, dtype)
    )


def give_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    """bf16 numbers, so that weights of either dtype get the same ones."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = (torch.randn(parameter.shape) * scale).bfloat16().to(parameter.dtype)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [optimizer.state[p] for p in model.parameters() if p in optimizer.state]
    return [
        *(p.detach().clone() for p in model.parameters()),
        *(state[name].clone() for state in states for name in sorted(state)),
    ]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(a.equal(b) for a, b in zip(left, right, strict=True))


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("dtype", "state", "expected"),
    [
        ("float32", "auto", "torch"),
        ("float32", "torch", "torch"),
        ("float32", "8bit", "8bit"),
        ("float32", "fp32", "fp32"),
        ("bfloat16", "auto", "8bit"),
        ("bfloat16", "8bit", "8bit"),
        ("bfloat16", "fp32", "fp32"),
        ("bfloat16", "exact", "exact"),
        ("bfloat16", "plain", "torch"),
    ],
)
def test_the_configuration_names_an_adamw(dtype: str, state: str, expected: str) -> None:
    overrides = [f"model.dtype={dtype}", f"optimizer.adamw={state}", "optimizer.eps=1e-7"]
    config = load_config("lab", overrides).optimizer
    optimizer = build_optimizer(config, Weights(network(dtype)))
    (group,) = optimizer.param_groups
    if expected == "torch":
        assert type(optimizer) is torch.optim.AdamW and group["fused"]
    else:
        assert isinstance(optimizer, sodfast_kernels.AdamW) and group["state"] == expected
    for name in ("lr", "betas", "eps", "weight_decay"):
        assert group[name] == getattr(config, name)


def test_a_burst_multiplies_the_rate_of_its_steps_alone() -> None:
    burst = {"first": 3, "last": 4, "factor": 8.0}
    config = OptimizerConfig.model_validate({"lr": 1e-3, "warmup_steps": 0, "lr_burst": burst})
    rates = [learning_rate(config, step) for step in range(1, 7)]
    assert rates == [1e-3, 1e-3, 8e-3, 8e-3, 1e-3, 1e-3]
    warm = config.model_copy(update={"warmup_steps": 6})
    assert learning_rate(warm, 3) == pytest.approx(4e-3)
    with pytest.raises(ValueError, match="first=5 comes after last=4"):
        OptimizerConfig.model_validate({"lr_burst": burst | {"first": 5}})


def test_presets_keep_fp32_weights_and_torchs_adamw() -> None:
    for preset in ("lab", "base"):
        config = load_config(preset, [])
        assert (config.model.dtype, config.optimizer.adamw) == ("float32", "auto")


@pytest.mark.parametrize(
    ("dtype", "state", "advice"),
    [
        ("bfloat16", "torch", "use 8bit, fp32 or exact, or plain"),
        ("float32", "exact", "use fp32"),
        ("float32", "plain", "use torch"),
    ],
)
def test_pairs_without_sense_are_refused(dtype: str, state: str, advice: str) -> None:
    with pytest.raises(UsageError) as error:
        load_config("lab", [f"model.dtype={dtype}", f"optimizer.adamw={state}"])
    message = str(error.value)
    assert f"optimizer.adamw={state}" in message and f"model.dtype={dtype}" in message
    assert advice in message and "\n" not in message


# ---------------------------------------------------------------- one update


@pytest.mark.parametrize("clip_norm", [1.0, 1e9])
@pytest.mark.parametrize(("dtype", "state"), [("float32", "fp32"), ("bfloat16", "exact")])
def test_the_fused_update_is_torchs_on_fp32_weights(
    dtype: str, state: str, clip_norm: float
) -> None:
    """With fp32 weights, and with the exact master of bf16 ones."""
    ours, oracle = network(dtype), network("float32")
    for mine, theirs in zip(ours.parameters(), oracle.parameters(), strict=True):
        theirs.data = mine.detach().float()
    fused = build_optimizer(OptimizerConfig(adamw=state), Weights(ours))
    torchs = build_optimizer(OptimizerConfig(), Weights(oracle))
    for step in range(1, 6):
        lr = 1e-3 * step
        give_gradients(ours, step)
        give_gradients(oracle, step)
        norms = [update(o, lr, clip_norm, torch.zeros(())) for o in (fused, torchs)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        assert all(parameter.grad is None for parameter in ours.parameters())
    for mine, theirs in zip(ours.parameters(), oracle.parameters(), strict=True):
        master = mine.detach()
        if state == "exact":
            remainder = fused.state[mine]["remainder"]
            master = join(master.view(-1), remainder.view(-1)).view_as(remainder)
        torch.testing.assert_close(master, theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("state", ["8bit", "plain", *slow(*FUSED[1:])])
def test_updates_below_the_weights_spacing(state: str) -> None:
    """150 updates of 1/50 of the spacing are 3 spacings: plain bf16 makes none of them."""
    spacing = 2.0**-8  # of bf16 just below 1
    model = nn.Linear(64, 64, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    config = OptimizerConfig(adamw=state, weight_decay=0.0)
    optimizer = build_optimizer(config, Weights(model))
    for _ in range(150):
        model.weight.grad = torch.ones_like(model.weight)
        update(optimizer, spacing / 50, 1e9, torch.zeros(()))
    moved = (1 - model.weight.detach().double()) / spacing
    if state == "plain":
        assert moved.abs().max() == 0
    else:
        assert moved.mean() == pytest.approx(3, abs=0.2)
    if state == "exact":
        assert moved.unique().tolist() == [3]


def test_a_parameter_without_a_gradient_is_updated_too() -> None:
    """Its momentum goes on and it decays, as with torch's AdamW."""
    model = network("bfloat16")
    optimizer = build_optimizer(OptimizerConfig(adamw="exact", weight_decay=0.5), Weights(model))
    give_gradients(model, 1)
    first, *_ = model.parameters()
    first.grad, before = None, first.detach().abs().sum()
    update(optimizer, 0.1, 1.0, torch.zeros(()))
    assert first.detach().abs().sum() < 0.97 * before
    assert optimizer.state[first]["step"] == 1


# ---------------------------------------------------------------- rounding is keyed


@pytest.mark.parametrize("state", FUSED)
def test_bits_are_a_function_of_the_seed(state: str) -> None:
    def train(seed: int) -> list[Tensor]:
        model = network("bfloat16")
        config = OptimizerConfig(adamw=state)
        optimizer = build_optimizer(config, Weights(model), seed)
        for step in range(3):
            give_gradients(model, step)
            update(optimizer, 1e-4, 1.0, torch.zeros(()))
        return everything(model, optimizer)

    assert equal(train(3), train(3))
    assert equal(train(3), train(4)) == (state == "exact")  # which rounds nothing away


def test_weights_and_the_teachers_average_round_by_different_bits() -> None:
    """`Teacher.apply` keys its average with the run's seed and the step, as AdamW counts them."""
    config = OptimizerConfig(adamw="8bit")
    (group,) = build_optimizer(config, Weights(network("bfloat16")), 5).param_groups
    place = {"step": 1, "offset": 0, "device": torch.device("cpu")}
    bits = [random_bits(4096, seed=seed, **place).double() for seed in (5, group["seed"])]
    assert abs(torch.corrcoef(torch.stack(bits))[0, 1]) < 0.08  # 5 standard errors


# ---------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("where", ["loss", "gradient", *slow("both")])
@pytest.mark.parametrize("before", [2, *slow(0)])
@pytest.mark.parametrize(
    ("dtype", "state"),
    [
        ("float32", "torch"),
        ("bfloat16", "8bit"),
        *slow(("float32", "8bit"), *(("bfloat16", s) for s in (*FUSED[1:], "plain"))),
    ],
)
def test_an_update_that_fails_never_happened(
    dtype: str, state: str, before: int, where: str
) -> None:
    """Nothing has moved, and what follows is what would have been: counts of steps included."""
    model = network(dtype)
    config = OptimizerConfig(adamw=state)
    optimizer = build_optimizer(config, Weights(model))

    def step(number: int) -> None:
        give_gradients(model, number)
        update(optimizer, 1e-3, 1.0, torch.zeros(()))

    for number in range(before):
        step(number)
    weights = [p.detach().clone() for p in model.parameters()]
    kept = deepcopy(optimizer.state_dict())
    give_gradients(model, 9)
    if where != "loss":
        next(iter(model.parameters())).grad.view(-1)[7] = torch.inf  # type: ignore[union-attr]
    loss = torch.tensor(0.0 if where == "gradient" else torch.nan)
    with pytest.raises(RunFailed, match=r"(nan|inf).*the update was not made"):
        update(optimizer, 1e-3, 1.0, loss)
    assert equal(weights, [p.detach() for p in model.parameters()])
    step(7)
    after = everything(model, optimizer)

    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.data.copy_(weight)
    optimizer = build_optimizer(config, Weights(model))
    optimizer.load_state_dict(kept)
    step(7)
    assert equal(after, everything(model, optimizer))
