"""From samples, rewards and teacher to the loss: weights, masks, and the definition in fp64.

Suffixes: N response tokens, V vocabulary, H hidden size.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sodfast.config import ObjectiveConfig, load_config
from sodfast.context import choose_demonstrations
from sodfast.objective import (
    _unpacked,
    group_advantages,
    micro_batch_loss,
    sequence_weights,
    to_device,
)
from sodfast.rollout.engine import Sample

# ---------------------------------------------------------------- advantages


def test_advantages_are_centred_within_their_group() -> None:
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.5]
    advantages = group_advantages(rewards, 4, normalize=False)
    assert advantages == [0.75, -0.25, -0.25, -0.25, 0.25, 0.25, -0.25, -0.25]
    assert group_advantages([0.7] * 6, 3, normalize=False) == pytest.approx([0.0] * 6)


def test_normalised_advantages_have_unit_spread() -> None:
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.5, 0.3, 0.3, 0.3, 0.3]
    advantages = np.array(group_advantages(rewards, 4, normalize=True)).reshape(3, 4)
    assert advantages.mean(1) == pytest.approx([0, 0, 0])
    assert advantages.std(1) == pytest.approx([1, 1, 0], rel=1e-4)


# ---------------------------------------------------------------- weights of an update

COEFFICIENTS = {"distill_coef": 0.5, "policy_coef": 3.0}
LENGTHS = [10, 1000, 7, 1]
DISTILLED = [True, True, False, True]


def test_sequence_mean_gives_every_sequence_the_same_say() -> None:
    config = ObjectiveConfig(reduction="sequence_mean", **COEFFICIENTS)
    weights = sequence_weights(config, LENGTHS, DISTILLED, [1.0] * 4)
    share = [weight * length for weight, length in zip(weights.distill, LENGTHS, strict=True)]
    # Masked sequences stay in the denominator: 4, not 3.
    assert share == pytest.approx([0.5 / 4, 0.5 / 4, 0, 0.5 / 4])
    share = [weight * length for weight, length in zip(weights.policy, LENGTHS, strict=True)]
    assert share == pytest.approx([3 / 4] * 4)


def test_token_mean_gives_every_token_the_same_say() -> None:
    config = ObjectiveConfig(reduction="token_mean", **COEFFICIENTS)
    weights = sequence_weights(config, LENGTHS, DISTILLED, [1.0] * 4)
    # Distillation divides by the tokens with m_i = 1, the policy term by all.
    assert weights.distill == pytest.approx([0.5 / 1011, 0.5 / 1011, 0, 0.5 / 1011])
    assert weights.policy == pytest.approx([3 / 1018] * 4)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_an_update_without_demonstrations_distils_nothing(reduction: Any) -> None:
    config = ObjectiveConfig(reduction=reduction)
    weights = sequence_weights(config, [3, 4], [False, False], [0.5, 0.0])
    assert weights.distill == [0.0, 0.0]
    assert [weights.matters(index) for index in (0, 1)] == [True, False]


def test_only_what_carries_a_gradient_matters() -> None:
    def matters(m: bool, advantage: float, **coefficients: float) -> bool:
        config = ObjectiveConfig(**coefficients)
        return sequence_weights(config, [5], [m], [advantage]).matters(0)

    assert matters(True, 0.0) and matters(False, -0.5) and not matters(False, 0.0)
    assert not matters(True, 0.0, distill_coef=0.0) and matters(True, 0.5, distill_coef=0.0)
    assert not matters(False, 0.5, policy_coef=0.0) and matters(True, 0.5, policy_coef=0.0)


# ---------------------------------------------------------------- who sees which demonstration


def demonstrations(rewards: Sequence[float], size: int, step: int = 1) -> list[int | None]:
    return choose_demonstrations(rewards, size, success_reward=0.5, seed=0, step=step)


def test_masks_of_groups_with_none_one_and_more_successes() -> None:
    assert demonstrations([0, 0, 0, 0], 4) == [None] * 4
    assert demonstrations([0, 0, 1, 0], 4) == [2, 2, None, 2]
    for step in range(20):
        chosen = demonstrations([1, 0, 0.5, 0.49], 4, step)
        assert chosen[0] == 2 and chosen[2] == 0
        assert {chosen[1], chosen[3]} <= {0, 2}
    assert demonstrations([1], 1) == [None]


@given(
    st.integers(1, 5),
    st.lists(st.sampled_from([0.0, 0.4, 0.5, 1.0]), max_size=20),
    st.integers(0, 2**63 - 1),
)
def test_a_demonstration_is_a_successful_sibling(
    size: int, rewards: list[float], seed: int
) -> None:
    rewards = rewards[: len(rewards) // size * size]
    chosen = choose_demonstrations(rewards, size, 0.5, seed, step=3)
    for index, source in enumerate(chosen):
        siblings = [
            other
            for other in range(len(rewards))
            if other // size == index // size and other != index and rewards[other] >= 0.5
        ]
        assert source in siblings if siblings else source is None


def test_demonstrations_are_uniform_and_independent() -> None:
    """χ² at the 0.1 % level over 3000 keyed steps; the draws are fixed, so this never flickers."""
    steps = 3000
    draws = [demonstrations([1, 1, 0, 1, 1], 5, step) for step in range(steps)]

    def chi_square(counts: Counter[Any], cells: int) -> float:
        assert len(counts) == cells
        return sum((count - steps / cells) ** 2 for count in counts.values()) * cells / steps

    for index, siblings in enumerate([3, 3, 4, 3, 3]):
        limit = {3: 13.82, 4: 16.27}[siblings]  # 2 and 3 degrees of freedom
        assert chi_square(Counter(draw[index] for draw in draws), siblings) < limit
    # Neighbouring rollouts, and one rollout in neighbouring steps, choose independently.
    assert chi_square(Counter((draw[3], draw[4]) for draw in draws), 9) < 26.12
    pairs = [(a[0], b[0]) for a, b in pairwise(draws)]
    assert chi_square(Counter(pairs), 9) < 26.12


def test_demonstrations_depend_on_seed_and_step() -> None:
    rewards = [1.0] * 64
    chosen = {
        (seed, step): tuple(choose_demonstrations(rewards, 8, 0.5, seed, step))
        for seed in (0, 1)
        for step in (1, 2)
    }
    assert len(set(chosen.values())) == 4
    assert demonstrations(rewards, 8) == list(chosen[0, 1])


# ---------------------------------------------------------------- the way to the device


def arrays(count: int) -> list[Tensor]:
    """Ids of more than 32 bits, and floats with every kind of bits."""
    ids = torch.arange(count) * 2**33 - 100
    floats = torch.randn(4, count, generator=torch.Generator().manual_seed(count))
    floats[:, :1], floats[:, 1:2] = float("inf"), -0.0
    return [ids, *floats]


class Copies(TorchDispatchMode):
    """Counts the copies from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **kwargs or {})


def test_on_the_cpu_nothing_is_copied() -> None:
    given = arrays(5)
    ids, floats = to_device(torch.device("cpu"), *given)
    assert all(moved is array for moved, array in zip((ids, *floats), given, strict=True))


@pytest.mark.parametrize("count", [1, 4, 7])
def test_one_copy_takes_all_arrays(count: int) -> None:
    with Copies() as copies:
        ids, floats = to_device(torch.device("meta"), *arrays(count))
    assert copies.count == 1
    assert ids.shape == (count,) and ids.dtype == torch.int64
    assert [(entry.shape, entry.dtype) for entry in floats] == [((count,), torch.float32)] * 4
    assert all(entry.storage_offset() % 4 == 0 for entry in floats)
    assert len({entry.untyped_storage()._cdata for entry in (ids, *floats)}) == 1


@pytest.mark.parametrize("count", [1, 4, 7])
def test_one_buffer_holds_every_bit(count: int) -> None:
    given = arrays(count)
    buffer = torch.full((6, 8), float("nan"))
    ids, floats = _unpacked(buffer, count)
    for view, array in zip((ids, *floats), given, strict=True):
        view.copy_(array)
    for view, array in zip((ids, *floats), given, strict=True):
        assert torch.equal(view, array)
        if view.is_floating_point():
            assert torch.equal(view.signbit(), array.signbit())


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 4, 7])
def test_every_bit_arrives(count: int) -> None:
    given = arrays(count)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids, floats = to_device(torch.device("cuda"), *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for moved, array in zip((ids, *floats), given, strict=True):
        assert moved.is_cuda and moved.is_contiguous()
        assert torch.equal(moved.cpu(), array)


# ---------------------------------------------------------------- the loss of an update


@dataclass
class Update:
    """Rollouts of one update with random hidden states; `teacher` is None where m_i = 0."""

    samples: list[Sample]
    hidden: list[Tensor]
    head: Tensor
    teacher: list[Tensor | None]
    teacher_head: Tensor
    advantages: list[float]

    def __post_init__(self) -> None:
        self.distilled = [rows is not None for rows in self.teacher]
        self.lengths = [len(sample.response) for sample in self.samples]

    def weights(self, config: ObjectiveConfig) -> list[tuple[float, float, float]]:
        weights = sequence_weights(config, self.lengths, self.distilled, self.advantages)
        return [weights.of(index) for index in range(len(self.samples))]


def update(lengths: Sequence[int], distilled: Sequence[bool]) -> Update:
    """Student's hidden size 8, teacher's 6, 23 tokens; the sampler's log-probs are a little off,
    so some ratios are clipped and some capped."""
    random = torch.Generator().manual_seed(len(lengths))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    head = 0.7 * normal(23, 8)
    samples, hidden = [], []
    for length in lengths:
        rows_NH = normal(length, 8)
        response = torch.randint(23, (length,), generator=random)
        logprob = torch.log_softmax(rows_NH @ head.T / 0.8, 1)
        old = logprob.gather(1, response[:, None]).squeeze(1) + 0.5 * normal(length)
        samples.append(Sample(torch.tensor([1]), response, old, torch.zeros(length), False))
        hidden.append(rows_NH)
    return Update(
        samples=samples,
        hidden=hidden,
        head=head,
        teacher=[
            normal(length, 6) if m else None for length, m in zip(lengths, distilled, strict=True)
        ],
        teacher_head=0.7 * normal(23, 6),
        advantages=[(-1) ** index * 0.25 * (index % 3) for index in range(len(lengths))],
    )


@dataclass
class Result:
    loss: float
    hidden: np.ndarray[Any, Any]  # gradients [N, H] and [V, H]
    head: np.ndarray[Any, Any]


def fused(
    config: ObjectiveConfig,
    rollouts: Update,
    parts: Sequence[Sequence[int]],
    softcap: float | None = None,
) -> Result:
    """The loss as the trainer forms it: one `micro_batch_loss` after the other."""
    hidden = [rows.clone().requires_grad_() for rows in rollouts.hidden]
    head = rollouts.head.clone().requires_grad_()
    weights = rollouts.weights(config)
    loss = 0.0
    for part in parts:
        output = micro_batch_loss(
            config,
            0.8,
            softcap,
            torch.cat([hidden[index] for index in part]),
            head,
            [rollouts.teacher[index] for index in part],
            rollouts.teacher_head,
            [rollouts.samples[index] for index in part],
            [weights[index] for index in part],
        )
        output.loss.backward()
        loss += float(output.loss.detach())
    gradients = [torch.zeros_like(rows) if rows.grad is None else rows.grad for rows in hidden]
    assert head.grad is not None
    return Result(loss, torch.cat(gradients).double().numpy(), head.grad.double().numpy())


def log_softmax(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def divergence(
    config: ObjectiveConfig, log_s: np.ndarray[Any, Any], log_q: np.ndarray[Any, Any]
) -> tuple[float, np.ndarray[Any, Any]]:
    """D of one token and ∂D/∂z of the student's scaled logits, from the closed formulas of
    arXiv 2601.20802 over the buckets K ∪ {tail}."""
    vocabulary = len(log_s)
    kept = np.argsort(-log_s, kind="stable")[: config.top_k or vocabulary]
    s, q = np.exp(log_s[kept]), np.exp(log_q[kept])
    bucket = np.full(vocabulary, -1)  # −1: outside every bucket
    bucket[kept] = np.arange(len(kept))
    if len(kept) < vocabulary and config.add_tail:
        bucket[bucket < 0] = len(kept)
        outside = bucket == len(kept)
        s = np.append(s, np.exp(log_s[outside]).sum())
        q = np.append(q, np.exp(log_q[outside]).sum())
    s, q = s / s.sum(), q / q.sum()
    alpha = config.alpha
    if alpha == 0:
        value, g = (q * np.log(q / s)).sum(), 1 - q / s
    elif alpha == 1:
        value, g = (s * np.log(s / q)).sum(), np.log(s / q)
    else:
        m = (1 - alpha) * s + alpha * q
        value = (1 - alpha) * (s * np.log(s / m)).sum() + alpha * (q * np.log(q / m)).sum()
        g = (1 - alpha) * np.log(s / m)
    centred = g - (s * g).sum()
    # A token's share of its bucket's gradient is its share of the bucket's mass.
    mass = np.exp(log_s)
    if not config.add_tail:
        mass = mass / mass[kept].sum()
    return float(value), np.where(bucket < 0, 0.0, mass * centred[bucket])


def definition(config: ObjectiveConfig, rollouts: Update, softcap: float | None) -> Result:
    """The same loss token by token in fp64, gradients from the closed formulas."""
    head = rollouts.head.double().numpy()
    loss, hidden_gradients, head_gradient = 0.0, [], np.zeros_like(head)
    total, all_tokens = len(rollouts.samples), sum(rollouts.lengths)
    distilled_tokens = sum(
        length
        for length, rows in zip(rollouts.lengths, rollouts.teacher, strict=True)
        if rows is not None
    )
    for index, sample in enumerate(rollouts.samples):
        length, advantage = rollouts.lengths[index], rollouts.advantages[index]
        if config.reduction == "sequence_mean":
            distill_share = policy_share = 1 / (total * length)
        else:
            distill_share, policy_share = 1 / max(1, distilled_tokens), 1 / all_tokens
        teacher = rollouts.teacher[index]
        for t in range(length):
            row = rollouts.hidden[index][t].double().numpy()
            z, slope = cap(head @ row, softcap)
            log_s = log_softmax(z / 0.8)
            token = int(sample.response[t])
            ratio = np.exp(np.clip(log_s[token] - float(sample.logprob[t]), -20, 20))
            gradient = np.zeros(len(head))
            if teacher is not None:
                logits = rollouts.teacher_head.double().numpy() @ teacher[t].double().numpy()
                log_q = log_softmax(cap(logits, softcap)[0] / 0.8)
                value, slope_D = divergence(config, log_s, log_q)
                rho = 1.0 if config.ratio_cap is None else min(ratio, config.ratio_cap)
                loss += config.distill_coef * distill_share * rho * value
                gradient += config.distill_coef * distill_share * rho * slope_D
            low, high = config.clip_range
            clipped = min(max(ratio, 1 - low), 1 + high)
            policy = -min(ratio * advantage, clipped * advantage)
            bound = math.inf if config.dual_clip is None else -config.dual_clip * advantage
            bounded = advantage < 0 and policy > bound
            loss += config.policy_coef * policy_share * (bound if bounded else policy)
            if ratio * advantage <= clipped * advantage and not bounded:
                one_hot = np.arange(len(head)) == token
                push = -advantage * ratio * (one_hot - np.exp(log_s))
                gradient += config.policy_coef * policy_share * push
            gradient *= slope / 0.8
            hidden_gradients.append(head.T @ gradient)
            head_gradient += np.outer(gradient, row)
    return Result(loss, np.stack(hidden_gradients), head_gradient)


def cap(z: np.ndarray[Any, Any], softcap: float | None) -> tuple[Any, Any]:
    """Soft-capped logits and their derivative."""
    if softcap is None:
        return z, 1.0
    tanh = np.tanh(z / softcap)
    return softcap * tanh, 1 - tanh**2


def assert_close(result: Result, expected: Result, tolerance: float = 2e-6) -> None:
    """Relative to the largest entry: fp32 sums round there."""
    assert result.loss == pytest.approx(expected.loss, rel=tolerance, abs=tolerance)
    for name in ("hidden", "head"):
        actual, wanted = getattr(result, name), getattr(expected, name)
        scale = np.abs(wanted).max() or 1.0
        assert np.abs(actual - wanted).max() <= tolerance * scale, name


MIXED = ([4, 1, 9, 3, 5, 2], [True, False, True, True, False, True])


@pytest.mark.parametrize("policy_coef", [0.0, 1.0])
@pytest.mark.parametrize("support", ["full", "top", "top and tail"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_loss_is_the_definition(alpha: float, support: str, policy_coef: float) -> None:
    for reduction in ("sequence_mean", "token_mean"):
        config = ObjectiveConfig(
            alpha=alpha,
            top_k=None if support == "full" else 5,
            add_tail=support != "top",
            policy_coef=policy_coef,
            distill_coef=0.7,
            reduction=reduction,
        )
        rollouts = update(*MIXED)
        assert_close(fused(config, rollouts, [range(6)]), definition(config, rollouts, None))


@pytest.mark.parametrize(
    ("keys", "softcap"),
    [
        ({"ratio_cap": None}, None),
        ({"ratio_cap": 0.9}, None),
        ({"clip_range": (0.0, 0.0)}, None),
        ({"clip_range": (0.9, 9.0)}, None),
        ({"dual_clip": 1.1}, None),
        ({"distill_coef": 0.0}, None),
        ({"top_k": 1}, None),
        ({"top_k": 1000}, None),
        ({}, 1.5),
        ({"top_k": 4, "alpha": 1.0}, 1.5),
    ],
)
def test_every_setting_reaches_the_loss(keys: dict[str, Any], softcap: float | None) -> None:
    config = ObjectiveConfig(**keys)
    rollouts = update(*MIXED)
    expected = definition(config, rollouts, softcap)
    assert_close(fused(config, rollouts, [range(6)], softcap), expected)
    other = definition(ObjectiveConfig(), rollouts, None)
    if keys != {"top_k": 1000}:  # k ≥ V is the full vocabulary, which is the default
        assert abs(expected.loss - other.loss) > 1e-4


def test_the_data_clip_and_cap_some_ratios() -> None:
    """Otherwise the tests above would not see these branches."""
    rollouts = update(*MIXED)
    ratios = []
    for rows_NH, sample in zip(rollouts.hidden, rollouts.samples, strict=True):
        logprob = torch.log_softmax(rows_NH @ rollouts.head.T / 0.8, 1)
        ratios += (logprob.gather(1, sample.response[:, None])[:, 0] - sample.logprob).exp()
    assert min(ratios) < 0.8 and max(ratios) > 2.0
    assert any(0.8 < ratio < 1.28 for ratio in ratios)


@pytest.mark.parametrize("reduction", ["token_mean", *slow("sequence_mean")])
@settings(max_examples=25)
@given(order=st.permutations(range(6)), cuts=st.sets(st.integers(1, 5)))
def test_the_cut_into_micro_batches_does_not_matter(
    reduction: Any, order: list[int], cuts: set[int]
) -> None:
    config = ObjectiveConfig(reduction=reduction, top_k=5)
    rollouts = update(*MIXED)
    bounds = [0, *sorted(cuts), 6]
    parts = [order[a:b] for a, b in pairwise(bounds)]
    assert_close(fused(config, rollouts, parts), fused(config, rollouts, [range(6)]))


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_rollouts_that_do_not_matter_can_be_left_out(reduction: Any) -> None:
    config = ObjectiveConfig(reduction=reduction)
    rollouts = update([4, 3, 5], [True, False, True])
    rollouts.advantages[1] = 0.0
    assert_close(fused(config, rollouts, [[0, 2]]), fused(config, rollouts, [[0, 1, 2]]))
    # Their tokens still count: as an update of their own the other two weigh more.
    alone = update([4, 5], [True, True])
    if reduction == "sequence_mean":
        assert alone.weights(config)[0][0] == pytest.approx(1.5 * rollouts.weights(config)[0][0])


def repeated(lengths: Sequence[int]) -> Update:
    """Two rollouts, each one token said `lengths` times."""
    rollouts = update([1, 1], [True, True])
    rollouts.advantages, rollouts.lengths = [0.5, -0.5], list(lengths)
    for index, length in enumerate(lengths):
        sample, rows = rollouts.samples[index], rollouts.teacher[index]
        assert rows is not None
        rollouts.samples[index] = Sample(
            sample.prompt,
            sample.response.expand(length),
            sample.logprob.expand(length),
            sample.entropy.expand(length),
            capped=False,
        )
        rollouts.hidden[index] = rollouts.hidden[index].expand(length, -1)
        rollouts.teacher[index] = rows.expand(length, -1)
    return rollouts


def test_ten_and_a_thousand_tokens_weigh_the_same() -> None:
    config = ObjectiveConfig(reduction="sequence_mean")
    short, long = (fused(config, repeated(lengths), [[0, 1]]) for lengths in ((10, 10), (10, 1000)))
    assert long.loss == pytest.approx(short.loss, rel=1e-5)
    assert np.abs(long.head - short.head).max() < 1e-4 * np.abs(short.head).max()
    # Under token_mean the long one takes over.
    config = ObjectiveConfig(reduction="token_mean")
    short, long = (fused(config, repeated(lengths), [[0, 1]]) for lengths in ((10, 10), (10, 1000)))
    assert np.abs(long.head - short.head).max() > 0.1 * np.abs(short.head).max()


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_a_teacher_that_says_the_same_gives_nothing(alpha: float, top_k: int | None) -> None:
    rollouts = update([4, 7], [True, True])
    rollouts.teacher, rollouts.teacher_head = list(rollouts.hidden), rollouts.head
    config = ObjectiveConfig(alpha=alpha, top_k=top_k, policy_coef=0.0)
    result = fused(config, rollouts, [[0, 1]])
    assert result.loss == 0.0
    assert not result.hidden.any() and not result.head.any()


# ---------------------------------------------------------------- presets of published baselines


@pytest.mark.parametrize("preset", ["sdpo", "sdpo_qwen3_8b", "opsd", "grpo"])
def test_a_baselines_loss_is_its_published_objective_in_fp64(preset: str) -> None:
    config = load_config(preset, []).objective
    rollouts = update(*MIXED)
    assert_close(fused(config, rollouts, [range(6)]), definition(config, rollouts, None))


def test_grpo_has_exactly_no_distillation_gradient() -> None:
    """Not a bit of the gradient depends on the teacher, which may as well be broken."""
    config = load_config("grpo", []).objective
    rollouts = update(*MIXED)
    expected = fused(config, rollouts, [range(6)])
    for rows in rollouts.teacher:
        if rows is not None:
            rows.fill_(math.nan)
    found = fused(config, rollouts, [range(6)])
    assert found.loss == expected.loss and np.abs(expected.head).max() > 0
    assert np.array_equal(found.hidden, expected.hidden)
    assert np.array_equal(found.head, expected.head)
