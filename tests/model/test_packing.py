"""Packed sequences against each of them alone through transformers' own attention.

Suffixes: N response tokens, H hidden size, V vocabulary.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow
from networks import (
    MODELS,
    Pairs,
    build,
    gradients,
    hidden_of,
    packed,
    random_pairs,
)
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
)

from sodfast.config import EMAConfig
from sodfast.model.language_model import cast_weights, decoder_layers, output_head, recompute_layers
from sodfast.model.liger import patch
from sodfast.model.packing import (
    ATTENTION,
    micro_batches,
    own_attention,
    packed_hidden,
    use_packed_attention,
)
from sodfast.teacher import Teacher

SIZES_OF_PAIRS = [(7, 3), (1, 1), (12, 9), (2, 8), (2, 8), (5, 5), (1, 20), (20, 1)]


def each_alone(network: Any, pairs: Pairs) -> Tensor:
    """The oracle: [N, H] by one plain forward pass for each sequence."""
    parts = []
    for context, response in pairs:
        ids = torch.cat([context, response])[None]
        hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
        parts.append(hidden[0, len(context) - 1 : -1])
    return torch.cat(parts)


# ---------------------------------------------------------------- packed equals apart


@pytest.mark.parametrize(
    ("name", "recompute", "mode"),
    [
        *product(["qwen3"], [False, True], ["eval", "train"]),
        *slow(*product(["llama", "gemma2"], [False, True], ["eval", "train"])),
        ("qwen2-window", False, "eval"),
        ("mistral-window", False, "eval"),
    ],
)
def test_packed_is_each_sequence_alone(name: str, recompute: bool, mode: str) -> None:
    network = build(name).train(mode == "train")
    student, pairs = packed(network), random_pairs(SIZES_OF_PAIRS)
    if recompute:
        recompute_layers(student)
    hidden_NH, expected_NH = hidden_of(student, pairs), each_alone(network, pairs)
    torch.testing.assert_close(hidden_NH, expected_NH, rtol=1e-5, atol=1e-5)
    found, expected = gradients(student, hidden_NH), gradients(network, expected_NH)
    assert found.keys() == expected.keys()
    for path in found:
        torch.testing.assert_close(found[path], expected[path], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("storage", ["device", "host"])
@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma2"])
def test_a_teacher_scores_as_each_sequence_alone(name: str, storage: Any) -> None:
    """With weights of its own, from a student that recomputes its layers."""
    network = build(name)
    student, pairs = packed(network), random_pairs(SIZES_OF_PAIRS)
    recompute_layers(student)
    teacher = Teacher(student, EMAConfig(rate=0.0), 0, storage)
    teacher.prepare_update()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5)
        expected_NH = each_alone(network, pairs)
    scores = teacher.score([c for c, _ in pairs], [r for _, r in pairs], 30)
    assert all(rows is not None for rows in scores.hidden)
    rows_NH = torch.cat([rows for rows in scores.hidden if rows is not None])
    torch.testing.assert_close(rows_NH, expected_NH, rtol=1e-5, atol=1e-5)
    assert scores.head.equal(output_head(network))


@pytest.mark.slow
@settings(max_examples=30)
@given(
    st.sampled_from(["qwen3", "gemma2"]),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
)
def test_any_lengths(name: str, sizes: list[tuple[int, int]]) -> None:
    network, pairs = build(name), random_pairs(sizes)
    with torch.no_grad():
        expected_NH = each_alone(network, pairs)
        use_packed_attention(network)
        hidden_NH = hidden_of(network, pairs)
    torch.testing.assert_close(hidden_NH, expected_NH, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_no_sequence_sees_another(name: str) -> None:
    """To the bit: other tokens elsewhere change nothing, and no gradient leaves a sequence."""
    student = packed(build(name))
    first, second, third = (torch.arange(2, 2 + n) for n in (9, 14, 9))
    for changed in (second + 16, second.flip(0)):
        with torch.no_grad():
            before = packed_hidden(student, [first, second, third])
            after = packed_hidden(student, [first, changed, third])
        assert before[:9].equal(after[:9]) and before[23:].equal(after[23:])
        assert not before[9:23].isclose(after[9:23]).all()
    embedding = student.get_input_embeddings()
    seen: list[Tensor] = []
    embedding.register_forward_hook(lambda *args: seen.append(args[2].retain_grad() or args[2]))
    packed_hidden(student, [first, second, third])[9:23].square().sum().backward()
    assert seen[0].grad is not None
    gradient_TH = seen[0].grad[0]
    assert gradient_TH[9:23].any(1).all() and not gradient_TH[:9].any()
    assert not gradient_TH[23:].any()


# ---------------------------------------------------------------- the two traps


@pytest.mark.parametrize("mask", [None, torch.ones(1, 8, dtype=torch.int64)])
def test_without_bounds_the_network_raises(mask: Tensor | None) -> None:
    student = packed(build("qwen3"))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    for options in ({}, {"position_ids": positions}, {"use_cache": False}):
        with pytest.raises(RuntimeError, match="own_attention"):
            student(input_ids=torch.arange(8)[None], attention_mask=mask, **options)


def test_bounds_of_another_row_raise() -> None:
    student = packed(build("qwen3"))
    bounds: list[Any] = []
    decoder_layers(student)[0].register_forward_pre_hook(
        lambda _, args, kwargs: bounds.append(kwargs["packed"]), with_kwargs=True
    )
    packed_hidden(student, [torch.arange(3), torch.arange(4)])
    for ids in (torch.arange(8)[None], torch.arange(14).view(2, 7)):
        with pytest.raises(RuntimeError, match="own_attention"):
            student.base_model(input_ids=ids, use_cache=False, packed=bounds[0])


def test_another_attention_is_never_given_packed_sequences() -> None:
    network = build("qwen3")
    with pytest.raises(RuntimeError, match="join"):
        hidden_of(network, random_pairs([(2, 2)]))
    student = packed(network)
    with own_attention(student), pytest.raises(RuntimeError, match="join"):
        hidden_of(student, random_pairs([(2, 2)]))


def test_dropout_in_attention_is_refused() -> None:
    network = build("llama")
    for layer in decoder_layers(network):
        layer.self_attn.attention_dropout = 0.5
    student = packed(network)
    hidden_of(student, random_pairs([(2, 2)]))
    with pytest.raises(NotImplementedError, match="dropout"):
        hidden_of(student.train(), random_pairs([(2, 2)]))


@pytest.mark.parametrize(("name", "own"), [("qwen3", "sdpa"), ("gemma2", "eager")])
def test_own_attention_is_transformers_own(name: str, own: str) -> None:
    network = build(name)
    student, ids = packed(network), torch.arange(12).view(2, 6)
    with torch.no_grad(), own_attention(student):
        assert student.config._attn_implementation == own
        logits = student(input_ids=ids).logits
        torch.testing.assert_close(logits, network(input_ids=ids).logits, rtol=0, atol=1e-5)
        with own_attention(student):  # within itself it changes nothing
            pass
        assert student.config._attn_implementation == own
    with pytest.raises(KeyError), own_attention(student):
        raise KeyError
    assert student.config._attn_implementation == ATTENTION
    hidden_of(student, random_pairs([(2, 2)]))


def test_a_saved_model_does_not_know_of_it(tmp_path: Path) -> None:
    student = packed(build("qwen3"))
    student.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


# ---------------------------------------------------------------- micro-batches


@given(st.lists(st.integers(1, 60)), st.integers(1, 200))
def test_micro_batches_hold_each_index_once_within_the_budget(
    lengths: list[int], budget: int
) -> None:
    batches = list(micro_batches(lengths, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in batch) for batch in batches]
    for batch, tokens in zip(batches, sums, strict=True):
        assert len(batch) == 1 or tokens <= budget
        decreasing = [lengths[index] for index in batch]
        assert decreasing == sorted(decreasing, reverse=True)
    assert not lengths or lengths[batches[0][0]] == max(lengths)
    # No two groups would have fitted into one.
    assert all(a + b > budget for i, a in enumerate(sums) for b in sums[:i])


def test_micro_batches_fill_what_is_left() -> None:
    assert list(micro_batches([2, 5, 2, 3, 9, 12], 9)) == [[5], [4], [1, 3], [0, 2]]
    assert list(micro_batches([2, 5, 2, 3, 1], 9)) == [[1, 3, 4], [0, 2]]
    assert list(micro_batches([], 9)) == []


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma2"])
def test_on_a_gpu_bf16_gradients_point_where_fp32_ones_do(name: str, fused: bool) -> None:
    """With recomputed layers, and with Liger's kernels where they are installed."""
    if fused:
        pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    network, pairs = build(name), random_pairs(SIZES_OF_PAIRS)
    expected = gradients(network, each_alone(network, pairs))
    student = packed(network).to("cuda")
    cast_weights(student, torch.bfloat16)
    if fused:
        patch(student)
    recompute_layers(student)
    found = gradients(student, hidden_of(student, pairs))
    both = [torch.cat([g.float().cpu().flatten() for g in x.values()]) for x in (found, expected)]
    assert torch.cosine_similarity(*both, dim=0) > 0.99
