"""Weights laid out as one matrix: the same values in the same parameters, live for every writer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow
from rollouts import NETWORKS, answer, equal_bits, ragged, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sodfast.config import LoRAConfig
from sodfast.model.joined import apart, join_weights, joined
from sodfast.model.language_model import LanguageModel, cast_weights
from sodfast.model.load import load_model
from sodfast.model.lora import add_adapters, merge_adapters
from sodfast.rollout.decoder import Decoder
from sodfast.rollout.native import NativeEngine

CPU = torch.device("cpu")


def groups(network: Any) -> list[list[nn.Linear]]:
    layers = network.model.layers
    return [
        *([x.self_attn.q_proj, x.self_attn.k_proj, x.self_attn.v_proj] for x in layers),
        *([x.mlp.gate_proj, x.mlp.up_proj] for x in layers),
    ]


def matrices(network: Any) -> list[Tensor | None]:
    return [joined([linear.weight for linear in linears]) for linears in groups(network)]


def all_joined(network: Any) -> bool:
    return all(matrix is not None for matrix in matrices(network))


@pytest.mark.parametrize("name", NETWORKS)
def test_values_stay_and_the_matrix_is_a_view_of_them(name: str) -> None:
    network = tiny(name).network
    before = {path: p.detach().clone() for path, p in network.named_parameters()}
    parameters = dict(network.named_parameters())
    assert not any(matrix is not None for matrix in matrices(network))
    join_weights(network, CPU)
    assert dict(network.named_parameters()) == parameters  # the same objects
    assert all(p.equal(before[path]) and p.is_contiguous() for path, p in parameters.items())
    for linears, matrix in zip(groups(network), matrices(network), strict=True):
        assert matrix is not None and not matrix.requires_grad
        assert matrix.equal(torch.cat([linear.weight for linear in linears]))
        with torch.no_grad():
            linears[-1].weight[-1] = 7.0
        assert (matrix[-1] == 7.0).all()
        if linears[0].bias is not None:
            assert joined([linear.bias for linear in linears]) is not None


@pytest.mark.parametrize("name", ["llama", *slow(*(n for n in NETWORKS if n != "llama"))])
def test_answers_are_the_same_bits(name: str) -> None:
    apart, together = tiny(name), tiny(name)
    join_weights(together.network, CPU)
    found = [answer(NativeEngine(model, 8), ragged(11), 14) for model in (apart, together)]
    assert equal_bits(*found)
    weights = [Decoder(model.network, 8).layers[0].qkv.weight for model in (apart, together)]
    assert weights[0] is None and weights[1] is not None


def test_gradients_and_an_optimizers_steps_are_the_same_bits() -> None:
    networks = [tiny("llama").network for _ in range(2)]
    join_weights(networks[1], CPU)
    decoder = Decoder(networks[1], 8)
    ids = torch.arange(2, 14)[None]
    for network in networks:
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True)
        for _ in range(3):
            network(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for left, right in zip(*(network.parameters() for network in networks), strict=True):
        assert left.equal(right)
    assert all_joined(networks[1])
    matrix, linears = decoder.layers[1].gate_up.weight, groups(networks[1])[4]
    assert matrix is not None and matrix.equal(torch.cat([linear.weight for linear in linears]))


def test_a_state_dict_is_loaded_into_the_matrix() -> None:
    network = tiny("qwen3").network
    other = copy.deepcopy(network)
    join_weights(network, CPU)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    network.load_state_dict(other.state_dict())
    assert all_joined(network)
    for linears, matrix in zip(groups(other), matrices(network), strict=True):
        assert matrix is not None
        assert matrix.equal(torch.cat([linear.weight for linear in linears]))


def test_copies_are_as_large_as_before_and_know_that_they_lie_apart() -> None:
    network = tiny("qwen3").network
    join_weights(network, CPU)
    twin = copy.deepcopy(network)
    assert not any(matrix is not None for matrix in matrices(twin))
    for parameter in twin.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    cast_weights(network, torch.float32)  # nothing to round
    assert all_joined(network)
    cast_weights(network, torch.bfloat16)
    assert not any(matrix is not None for matrix in matrices(network))


def test_neighbours_of_another_storage_or_order_are_no_matrix() -> None:
    whole = torch.arange(24.0).view(6, 4)
    first, second, third = whole.split(2)
    assert torch.equal(joined([first, second, third]), whole)  # type: ignore[arg-type]
    assert torch.equal(joined([second, third]), whole[2:])  # type: ignore[arg-type]
    assert joined([second, first]) is None
    assert joined([first, third]) is None
    assert joined([first, second.clone()]) is None
    assert joined([first, whole.flatten()[8:14].view(2, 3)]) is None
    assert joined([whole[:, :2], whole[:, 2:]]) is None
    assert joined([first, second.view(torch.int32)]) is None
    # At the right offset, of another storage.
    assert joined([first, whole.clone()[2:4]]) is None


def test_linears_of_different_dtypes_stay_as_they_are() -> None:
    network = tiny("qwen3").network
    network.model.layers[0].self_attn.k_proj.bfloat16()
    join_weights(network, CPU)
    assert [matrix is None for matrix in matrices(network)] == [True] + [False] * 5
    assert network.model.layers[0].self_attn.k_proj.weight.dtype == torch.bfloat16


def test_a_loaded_model_is_joined_and_its_files_are_what_they_were(
    tiny_model: Path, tmp_path: Path
) -> None:
    network = load_model(str(tiny_model), CPU).network
    assert all_joined(network)
    network.save_pretrained(tmp_path / "together")
    copy.deepcopy(network).save_pretrained(tmp_path / "apart")
    files = [tmp_path / name / "model.safetensors" for name in ("together", "apart")]
    assert files[0].read_bytes() == files[1].read_bytes()
    save_file(
        {name: p.detach() for name, p in network.named_parameters()}, tmp_path / "x.safetensors"
    )
    stored = load_file(tmp_path / "x.safetensors")
    assert all(stored[name].equal(p) for name, p in network.named_parameters())


def test_adapters_and_their_merge_leave_the_matrix_live(model: LanguageModel) -> None:
    pytest.importorskip("peft")
    join_weights(model.network, CPU)
    add_adapters(model, LoRAConfig(rank=2), 0)
    assert Decoder(model.network, 8).layers[0].qkv.weight is None  # adapters have their own
    merge_adapters(model.network)
    assert all_joined(model.network)
    assert Decoder(model.network, 8).layers[0].qkv.weight is not None


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_saving_copies_no_weight(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the file is that of a network whose weights were never joined, tied ones left out."""
    network = tiny(name).network
    network.save_pretrained(tmp_path / "before")
    join_weights(network, CPU)
    state = network.state_dict()
    found = apart(state)
    assert all(found[n].data_ptr() == t.data_ptr() and found[n].equal(t) for n, t in state.items())
    copies = []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda *a, **k: (copies.append(a), clone(*a, **k))[1])
    network.save_pretrained(tmp_path / "joined", state_dict=found)
    assert not copies
    files = [tmp_path / folder / "model.safetensors" for folder in ("before", "joined")]
    assert files[0].read_bytes() == files[1].read_bytes()
    network.save_pretrained(tmp_path / "shared")  # what this is for
    assert copies
