"""A configuration's network without weights: whose config.json it is, and its sizes."""

import json
from pathlib import Path

import pytest
import torch
from architectures import qwen
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoConfig, AutoModelForCausalLM

from sodfast.config import load_config
from sodfast.errors import UsageError
from sodfast.memory.network import architecture, block_sizes, empty_network, parameter_sizes
from sodfast.parallel.offload import ALIGNMENT


def test_an_empty_network_has_the_sizes_of_a_real_one_and_no_memory() -> None:
    network = empty_network(json.dumps(qwen(2)), torch.float32, False, False)
    real = AutoModelForCausalLM.from_config(AutoConfig.for_model(**qwen(2)))
    shapes = [{name: p.shape for name, p in n.named_parameters()} for n in (network, real)]
    assert shapes[0] == shapes[1]
    assert all(isinstance(parameter, FakeTensor) for parameter in network.parameters())
    sizes = [parameter.nbytes for parameter in real.parameters()]
    assert parameter_sizes(network) == (sum(sizes) // 4, sum(sizes), sum(sizes))
    layers, others = block_sizes(network)
    assert len(layers) == 2
    aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    assert sum(layers) + sum(others) == sum(aligned)


def test_a_models_config_may_come_from_the_hubs_cache(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sodfast.memory.network.try_to_load_from_cache",
        lambda name, file: f"{small_model}/{file}" if name == "some/model" else None,
    )
    assert architecture(load_config(None, ["model.path=some/model"])) == qwen(2)
    with pytest.raises(UsageError, match=r"config\.json"):
        architecture(load_config(None, ["model.path=another/model"]))


def test_a_shape_that_is_not_shipped_is_refused() -> None:
    with pytest.raises(UsageError, match=r"model\.random=Qwen/Qwen9 .*Qwen/Qwen3-0\.6B, "):
        architecture(load_config(None, ["model.random=Qwen/Qwen9"]))
