"""Chunks are the whole, cut; what is done to chunks is what is done to the whole, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair import Pair
from sodfast_kernels.parameters import BLOCK
from torch import Tensor
from torch.distributed.tensor import DTensor

from sodfast.commands import build_trainer
from sodfast.config import EMAConfig, OptimizerConfig, load_config
from sodfast.model.language_model import LanguageModel
from sodfast.model.load import load_model
from sodfast.optimizer import alignment, build_optimizer, update
from sodfast.parallel.fsdp import Chunk, ShardedWeights, Weights
from sodfast.parallel.ranks import Ranks
from sodfast.run.console import Reporter
from sodfast.run.restore import optimizer_tensors
from sodfast.schedule import Decision
from sodfast.teacher import Teacher


@given(
    st.lists(st.integers(0, 40), min_size=0, max_size=3),
    st.integers(1, 9),
    st.sampled_from([8, BLOCK]),
)
def test_chunks_are_the_whole_cut(shape: list[int], ranks: int, alignment: int) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    chunk = Chunk.of(whole, ranks, alignment)
    parts = [chunk.shard(whole, rank) for rank in range(ranks)]
    if not chunk.size:
        assert all(part is whole for part in parts)
        return
    assert chunk.size % alignment == 0
    assert torch.cat(parts).equal(whole)
    # FSDP cuts as torch.chunk does.
    assert [len(part) for part in parts if len(part)] == [len(c) for c in whole.chunk(ranks)]
    if alignment == BLOCK:  # exponents of 8-bit moments go with the blocks of their chunk
        exponents = torch.arange(-(-whole.numel() // BLOCK))
        if len(exponents) != whole.numel():
            blocks = [chunk.shard(exponents, rank) for rank in range(ranks)]
            assert [len(b) for b in blocks] == [-(-part.numel() // BLOCK) for part in parts]
            assert torch.cat(blocks).equal(exponents)


# ---------------------------------------------------------------- 16-bit rounding


def moved(ranks: Ranks, path: Path, state: str) -> dict[str, Tensor]:
    """Weights, moments and an averaging teacher's weights after two updates by given gradients."""
    model = load_model(str(path), torch.device("cpu"), torch.bfloat16)
    network = model.network
    config = OptimizerConfig(lr=1e-2, adamw=state)  # type: ignore[arg-type]
    weights = Weights(network)
    if ranks.size > 1:
        weights = ShardedWeights(network, ranks, alignment(config, torch.bfloat16))
    teacher = Teacher(network, EMAConfig(rate=0.3), 0, student_weights=weights)
    optimizer = build_optimizer(config, weights, seed=3)
    norm = torch.tensor(2.0)
    for step in (1, 2):
        gradients = {}
        for name, parameter in network.named_parameters():
            generator = torch.Generator().manual_seed(1000 * step + len(gradients))
            gradient = torch.randn(parameter.shape, generator=generator)
            gradients[name] = (1e-2 * gradient).to(parameter.dtype)
        for own, gradient in zip(
            weights.parameters, weights.shard(gradients).values(), strict=True
        ):
            own.grad = gradient
        teacher.prepare_update()
        update(optimizer, 1e-2, 1.0, torch.tensor(0.0), norm)
        teacher.apply(Decision("average", rate=0.3), step)
    found = {f"student:{name}": t for name, t in weights.state_dict().items()}
    found |= {f"teacher:{name}": t for name, t in weights.gather_full(teacher.own()).items()}
    moments = weights.gather_full(optimizer_tensors(network, optimizer))
    return found | {f"moment:{name}": t for name, t in moments.items()}


@pytest.mark.parametrize("state", ["8bit", "fp32", "exact"])
def test_two_ranks_round_16_bits_as_one_does(pair: Pair, tiny_model: Path, state: str) -> None:
    one = moved(Ranks(), tiny_model, state)
    two, nothing = pair(moved, tiny_model, state)
    assert all(name.startswith("student:") for name in nothing)  # buffers at most
    one.pop("student:lm_head.weight")  # tied to the embedding
    assert one.keys() == two.keys()
    assert [name for name in one if not one[name].equal(two[name])] == []


# ---------------------------------------------------------------- what a rank holds


def held(ranks: Ranks, out: Path, overrides: list[str]) -> dict[str, tuple[int, int]]:
    """Bytes of this rank's parts and of the whole, after a step; and, in the midst of one, of the
    gradients."""
    config = load_config("lab", [*overrides, f"out={out}"])
    trainer = build_trainer(config, None, Reporter(), ranks)
    network = trainer.model.network
    gradients: list[tuple[int, int]] = []
    measure = trainer.student.weights.gradient_norm

    def gradient_norm() -> Tensor | None:
        registered = [p.grad for p in network.parameters()]
        gradients.append(sizes(registered))
        return measure()

    trainer.student.weights.gradient_norm = gradient_norm  # type: ignore[method-assign]
    trainer.train()
    trainer.run.close()
    own = trainer.teacher.own()
    state = [t for s in trainer.student.optimizer.state.values() for t in s.values() if t.dim()]
    return {
        "weights": sizes(network.parameters()),
        "gradients": gradients[0],
        "teacher": (sizes(own.values())[0], sizes(network.parameters())[1]),
        "moments": (sizes(state)[0], 2 * sizes(network.parameters())[1]),
    }


def sizes(parameters: Any) -> tuple[int, int]:
    """Bytes that are really there, storages and all, and bytes of the whole."""
    found = list(parameters)
    local = [p.to_local() if isinstance(p, DTensor) else p for p in found]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}
    return sum(storages.values()), sum(p.numel() * p.element_size() for p in found)


def test_a_rank_holds_half_of_everything(pair: Pair, tiny_run: list[str], tmp_path: Path) -> None:
    overrides = [*tiny_run, "schedule.kind=ema", "steps=1"]
    for found in pair(held, tmp_path / "run", overrides):
        for what, (local, whole) in found.items():
            assert 0.4 * whole < local < 0.6 * whole, what


def lookup(ranks: Ranks, path: Path) -> tuple[bool, bool, bool]:
    """Whether weights are whole within `whole`, cut outside, and the same again after a teacher's
    have stood in their place."""
    model: LanguageModel = load_model(str(path), torch.device("cpu"))
    expected = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    weights = ShardedWeights(model.network, ranks, 8)
    teacher = Teacher(model.network, EMAConfig(rate=0.3), 0, student_weights=weights)
    teacher.prepare_update()
    with torch.no_grad():
        for parameter in weights.parameters:
            parameter.mul_(2)
    ids = [torch.tensor([1, 2, 3])]
    teacher.score(ids, ids, 100)
    with weights.whole():
        whole = all(p.equal(2 * expected[n]) for n, p in model.network.named_parameters())
    cut = any(isinstance(p, DTensor) for p in model.network.parameters())
    before = teacher.own()
    kept = all(t.equal(weights.shard(expected)[n]) for n, t in before.items())
    return whole, cut, kept


def test_weights_are_whole_for_a_while(pair: Pair, tiny_model: Path) -> None:
    assert pair(lookup, tiny_model) == [(True, True, True)] * 2
