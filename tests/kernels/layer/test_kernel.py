"""The Triton kernels of a layer: any shape, agreement with the PyTorch path, configurations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import DEVICE
from sodfast_kernels import rope_and_cache, silu_and_mul
from sodfast_kernels.layer import kernel as layer_kernel


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.slow
@pytest.mark.triton
@settings(max_examples=30)
@given(
    tokens=st.integers(0, 4),
    heads=st.integers(1, 9),
    kv_heads=st.integers(1, 4),
    half=st.integers(1, 70),
    gains=st.booleans(),
    cached=st.booleans(),
)
def test_any_shape(tokens, heads, kv_heads, half, gains, cached):
    """The paths write to the same places, and differ by rounding alone."""
    qkv = draw(tokens, heads + 2 * kv_heads, 2 * half)
    cos, sin = draw(tokens, 2 * half, seed=1), draw(tokens, 2 * half, seed=2)
    gain = draw(heads + kv_heads, 2 * half, seed=3) if gains else None
    found = []
    for backend in ("torch", "triton"):
        keys, values = (torch.zeros(3, 2, kv_heads, 2 * half, device=DEVICE) for _ in range(2))
        slot = torch.tensor([5, 0, 2, 3][:tokens], dtype=torch.int64, device=DEVICE)
        cache = (keys, values, slot // 2, slot % 2) if cached else None
        q, k = rope_and_cache(qkv, cos, sin, kv_heads, gain=gain, cache=cache, backend=backend)
        found.append((q, keys if k is None else k, values))
    for exact, other in zip(*found, strict=True):
        torch.testing.assert_close(other, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [2, 24, 64, 80, 128, 256, 1024])
def test_a_program_holds_whole_heads(width):
    sizes = layer_kernel.tile_sizes(width)
    assert sizes["HALF"] >= width // 2 and sizes["HALF"] & (sizes["HALF"] - 1) == 0
    assert sizes["HEADS"] >= 1 and sizes["HEADS"] * sizes["HALF"] <= max(256, sizes["HALF"])


def test_production_configurations_are_complete():
    names = set()
    for configuration in layer_kernel.production_configurations():
        name, kernel, signature, constexprs, _, streamed, sweeps = configuration
        assert name not in names
        names.add(name)
        assert not signature.keys() & constexprs.keys()
        assert signature.keys() | constexprs.keys() == set(kernel.arg_names)
        assert set(streamed) <= signature.keys()
        assert all(hasattr(layer_kernel, function) for function in sweeps)


@pytest.mark.gpu
def test_a_cuda_graph_reads_places_anew():
    qkv, gain = draw(2, 6, 64).bfloat16(), draw(5, 64, seed=3).bfloat16()
    cos, sin = draw(2, 64, seed=1).bfloat16(), draw(2, 64, seed=2).bfloat16()
    keys, values = (torch.zeros(8, 16, 1, 64, device=DEVICE).bfloat16() for _ in range(2))
    page, offset = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    gate_up = draw(2, 64)

    def step():
        q, _ = rope_and_cache(
            qkv, cos, sin, 1, gain=gain, cache=(keys, values, page, offset)
        )  # fmt: skip
        return q, silu_and_mul(gate_up)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for places in ([3, 5], [7, 0]):
        page.copy_(torch.tensor(places))
        offset.copy_(torch.tensor(places) + 1)
        graph.replay()
        assert values[page, offset].equal(qkv[:, -1:])
