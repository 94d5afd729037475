"""How many kernels a GPU runs in a decode layer: counted without one, on tensors without memory.

The network is on the device "meta", and the kernels are told that it is theirs. Each of torch's
functions that the forward calls is seen by name, and each launch of Triton. Views and new memory
launch nothing; whatever else is called counts as one kernel, or as what KERNELS says.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from rollouts import NETWORKS
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sodfast.model.joined import join_weights
from sodfast.rollout.decoder import Decoder, Place

# `addmm` copies its first argument before it adds to it; in place, as `addmm_`, it does not.
KERNELS = {"addmm": 2}
NONE = {
    *("__get__", "__len__", "__hash__", "dim", "size", "stride", "data_ptr", "is_contiguous"),
    *("view", "flatten", "unflatten", "split", "chunk", "t", "transpose", "detach", "unsqueeze"),
    *("new_empty", "empty", "element_size", "numel"),
}
ATTENTION = 2  # launches of decode_attention: the splits and their merge


class Launches(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        free = args[0].is_contiguous() if name == "contiguous" else name in NONE
        self.seen[name] += KERNELS.get(name, not free)
        return func(*args, **(kwargs or {}))


class Attention:
    """Stands for attention over pages, of which it launches nothing."""

    def __init__(self, decoder: Decoder, tokens: int) -> None:
        kv, size = decoder.kv_heads, decoder.head_dim
        keys, values = decoder.embedding.new_empty(2, 4, 16, kv, size)
        page, offset = torch.empty(2, tokens, dtype=torch.int64, device=keys.device)
        self.places = Place(keys, values, page, offset)

    def place(self, layer: int) -> Place:
        return self.places

    def __call__(self, layer: int, q_TAD: Tensor, k_TKD: None, v_TKD: None) -> Tensor:
        assert k_TKD is None and v_TKD is None
        return q_TAD


def kernels_of_a_layer(
    monkeypatch: pytest.MonkeyPatch, name: str, tokens: int, join: bool = True
) -> Counter[str]:
    """What two layers more launch, halved."""
    interface = pytest.importorskip("triton.runtime").KernelInterface
    for module in ("rope", "silu"):
        monkeypatch.setattr(f"sodfast_kernels.layer.{module}.uses_triton", lambda *_: True)
    counted = []
    device = torch.device("meta")
    with torch.no_grad(), device:
        network = NETWORKS[name]().bfloat16()
        if join:
            join_weights(network, device)
        decoder = Decoder(network, 32)
        token_T = torch.empty(tokens, dtype=torch.int64, device=device)
        attend = Attention(decoder, tokens)
        for layers in (decoder.layers[:1], decoder.layers):
            decoder.layers = layers
            with Launches() as launches:

                def launch(kernel: Any, grid: Any, seen: Counter[str] = launches.seen) -> Any:
                    seen[kernel.fn.__name__] += 1
                    return lambda **arguments: None

                monkeypatch.setattr(interface, "__getitem__", launch)
                decoder.forward(token_T, token_T, attend)
            counted.append(launches.seen)
    few, many = counted
    assert all((many[key] - few[key]) % 2 == 0 for key in many)
    return Counter({key: n for key in many if (n := (many[key] - few[key]) // 2)})


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral"])
def test_a_decode_layer_is_eight_kernels_beside_attention(
    monkeypatch: pytest.MonkeyPatch, name: str, tokens: int
) -> None:
    found = kernels_of_a_layer(monkeypatch, name, tokens)
    assert found == {
        "rms_norm": 2,
        "linear": 2,  # queries, keys and values; gate and up
        "rope_and_cache_kernel": 1,
        "addmm_": 2,  # output and down, each with the residual
        "silu_and_mul_kernel": 1,
    }
    assert found.total() == 8 and found.total() + ATTENTION == 10


def test_weights_that_lie_apart_cost_a_product_each(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels_of_a_layer(monkeypatch, "qwen3", 4, join=False)
    assert found["mm"] == 5 and found.total() == 11


def test_a_copy_of_the_residual_would_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    add = torch.Tensor.addmm_

    def copying(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        torch.addmm(residual, x, weight)
        return add(residual, x, weight)

    monkeypatch.setattr(torch.Tensor, "addmm_", copying)
    assert kernels_of_a_layer(monkeypatch, "qwen3", 4).total() > 8
