"""Number formats of the optimizer's state: bf16 + remainder is fp32, 8-bit codes are unbiased."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow
from sodfast_kernels.parameters.formats import BLOCK, M_TOP, V_TOP, decode, encode, join, split
from sodfast_kernels.philox import random_bits

CPU = torch.device("cpu")


def bits_for(values: torch.Tensor, step: int = 0) -> torch.Tensor:
    return random_bits(values.numel(), seed=0, step=step, offset=0, device=CPU)


@settings(max_examples=300)
@given(st.floats(width=32, allow_nan=False))
def test_weight_and_remainder_are_the_fp32_value(value):
    master = torch.tensor([value])
    weight, remainder = split(master)
    assert weight.dtype == torch.bfloat16 and remainder.dtype == torch.int16
    assert torch.equal(join(weight, remainder).view(torch.int32), master.view(torch.int32))
    if master.abs() < 3e38:  # the weight is a nearest bf16
        nearest = master.bfloat16().double()
        assert (weight.double() - master).abs() == (nearest - master).abs()


def test_ties_go_away_from_zero():
    tie = torch.tensor([1.0 + 2**-8, -1.0 - 2**-8])
    assert split(tie)[0].tolist() == [1.0 + 2**-7, -1.0 - 2**-7]


def test_every_remainder_belongs_to_one_weight():
    raw = (torch.arange(1 << 17, dtype=torch.int32) - (1 << 16)) + 0x3F800000
    weight, remainder = split(raw.view(torch.float32))
    assert torch.equal(join(weight, remainder).view(torch.int32), raw)
    assert remainder.min() == -32768 and remainder.max() == 32767


@pytest.mark.parametrize("raw", [0x7FFFFFFF, 0x7F800001, -1])
def test_a_nan_master_is_a_nan_weight(raw):
    weight, remainder = split(torch.tensor([raw], dtype=torch.int32).view(torch.float32))
    assert weight.isnan().all() and join(weight, remainder).isnan().all()


def uneven(count: int, top: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(top)
    values = torch.randn(count, generator=generator)
    values *= torch.exp(3 * torch.randn(count, generator=generator)) * 1e-5
    return values if top == M_TOP else values.square()


@pytest.mark.parametrize("top", [M_TOP, *slow(V_TOP)])
def test_codes_are_unbiased(top):
    values = uneven(3 * BLOCK + 7, top)
    rounds = 400
    total = torch.zeros(values.shape, dtype=torch.float64)
    for step in range(rounds):
        decoded = decode(*encode(values, bits_for(values, step), top), top)
        total += decoded
    # An eighth of the value, or of the smallest normal of its block, is the spacing.
    peak = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK).abs().amax(1)
    smallest = peak.repeat_interleave(BLOCK)[: len(values)].double() * 2.0 ** (1 - top)
    spacing = torch.maximum(values.abs().double(), smallest) / 8
    allowed = spacing / 2 * 5 / rounds**0.5
    if top == V_TOP:  # v > 0 is kept from zero
        allowed += smallest / 8
    assert ((total / rounds - values.double()).abs() <= allowed).all()


@pytest.mark.parametrize("top", [M_TOP, V_TOP])
def test_decoded_values_encode_to_themselves(top):
    values = uneven(5 * BLOCK, top)
    decoded = decode(*encode(values, bits_for(values), top), top)
    for bits in (torch.zeros_like(values), torch.full_like(values, 65535.0)):
        codes, exponent = encode(decoded, bits.int(), top)
        assert torch.equal(decode(codes, exponent, top), decoded)


@pytest.mark.parametrize("top", [M_TOP, V_TOP])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_the_largest_of_a_block_keeps_its_size_at_every_scale(top, scale):
    values = torch.linspace(0, 1, BLOCK) * scale
    decoded = decode(*encode(values, bits_for(values), top), top)
    assert (decoded - values).abs().max() <= values.max() / 8
    assert decoded[0] == 0.0


def test_a_tiny_second_moment_is_kept_from_zero():
    values = torch.full((BLOCK,), 1e-30)
    values[0], values[1] = 1.0, 0.0
    decoded = decode(*encode(values, torch.zeros(BLOCK, dtype=torch.int32), V_TOP), V_TOP)
    assert decoded[1] == 0.0 and (decoded[2:] > 0.0).all()


def test_signs_survive():
    values = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, -1e-3])
    decoded = decode(*encode(values, bits_for(values), M_TOP), M_TOP)
    assert torch.equal(decoded.sign()[:5], values.sign()[:5]) and decoded[5] <= 0.0


@pytest.mark.parametrize("top", [M_TOP, V_TOP])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_block_with_nan_or_infinity_never_decodes_to_numbers(top, bad):
    values = torch.ones(2 * BLOCK)
    values[3] = bad
    decoded = decode(*encode(values, bits_for(values), top), top)
    assert not decoded[:BLOCK].isfinite().any() and decoded[BLOCK:].isfinite().all()
