"""The Triton kernels of sampling against the definition: same tokens, same statistics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import DEVICE, TRUNCATIONS, draw_keys, draw_tokens
from marks import slow
from sodfast_kernels import sample_tokens
from sodfast_kernels.sampling import kernel as sampling_kernel

INF = math.inf


def agree(logits, **given):
    """The kernel draws the tokens that the definition draws, with the same statistics."""
    ours = draw_tokens(logits, draw_keys(len(logits), 3), **given, backend="triton")
    exact = draw_tokens(logits, draw_keys(len(logits), 3), **given, backend="torch")
    assert torch.equal(ours.token, exact.token)
    torch.testing.assert_close(ours[1:], exact[1:], rtol=1e-5, atol=1e-6, equal_nan=True)
    return ours


@pytest.mark.triton
@pytest.mark.parametrize("given", [*TRUNCATIONS[-2:], *slow(*TRUNCATIONS[:-2])], ids=str)
@pytest.mark.parametrize("vocabulary", [130, *slow(2, 3, 1027)])
def test_the_kernel_draws_what_the_definition_draws(given, vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 2 * torch.randn(2, vocabulary + 5, generator=generator)
    agree(logits[:, :vocabulary], **given)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [{"top_k": 9, "top_p": 0.8}, *slow({})], ids=str)
def test_16_bit_logits(dtype, given):
    logits = torch.randn(2, 333, generator=torch.Generator().manual_seed(4)).to(dtype)
    agree(logits, **given)


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.parametrize("given", TRUNCATIONS, ids=str)
def test_several_chunks_and_blocks(given):
    agree(2 * torch.randn(2, 19_001, generator=torch.Generator().manual_seed(5)), **given)


@pytest.mark.triton
@pytest.mark.parametrize("given", [*slow(*TRUNCATIONS[:-1]), TRUNCATIONS[-1]], ids=str)
def test_ties_in_the_kernel(given):
    logits = torch.randint(0, 3, (3, 200), generator=torch.Generator().manual_seed(6)).float()
    agree(logits, **given)
    agree(torch.full((2, 200), -0.0).index_fill(1, torch.arange(0, 200, 2), 0.0), **given)


@pytest.mark.slow
@pytest.mark.triton
@settings(max_examples=25)
@given(
    st.lists(
        st.floats(-8, 8, width=16) | st.sampled_from([0.0, 1.0, -INF]), min_size=2, max_size=40
    ),
    st.sampled_from([0, 0.3, 1.0, 3.0]),
    st.floats(0.01, 1),
    st.none() | st.integers(1, 45),
)
def test_the_kernel_agrees_on_any_row(row, temperature, top_p, top_k):
    logits = torch.tensor([row])
    out = agree(logits, temperature=temperature, top_p=top_p, top_k=top_k)
    if logits.isfinite().any():
        assert logits[0, out.token].item() > -INF and out.entropy.isfinite().all()
    else:
        assert out.entropy.isnan().all()


@pytest.mark.triton
def test_rows_further_apart_than_32_bits_count():
    base = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)  # untouched pages are free
    logits = base.as_strided((2, 40), (2**31, 1))
    logits.copy_(torch.randn(2, 40, generator=torch.Generator().manual_seed(9)))
    agree(logits, top_p=0.8)


def test_production_configurations_name_real_arguments():
    names = set()
    for configuration in sampling_kernel.production_configurations():
        name, kernel, signature, constexprs, _, streamed, _ = configuration
        assert name not in names
        names.add(name)
        assert not signature.keys() & constexprs.keys()
        assert signature.keys() | constexprs.keys() == set(kernel.arg_names)
        assert set(streamed) <= signature.keys()


@pytest.mark.gpu
@pytest.mark.parametrize("given", TRUNCATIONS, ids=str)
def test_a_cuda_graph_reads_sample_and_position_anew(given):
    logits = torch.randn(4, 5000, device="cuda", dtype=torch.bfloat16)
    sample, position = torch.arange(4, device="cuda"), torch.zeros(4, 1, device="cuda").long()[:, 0]
    key = {"seed": 3, "step": 4, "sample": sample, "position": position}
    sample_tokens(logits, **key, **given)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sample_tokens(logits, **key, **given)
    for place in (5, 6):
        position.fill_(place)
        graph.replay()
        assert torch.equal(out.token, sample_tokens(logits, **key, **given, backend="torch").token)
