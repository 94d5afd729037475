"""Philox against its published vectors; stochastic rounding: unbiased, exact where it can be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sodfast_kernels.philox import WORD, philox, random_bits, round_stochastic

CPU = torch.device("cpu")

# Known answers of Philox-4x32-10 published with Random123: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0_A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert philox(counter, key) == expected
    as_tensors = tuple(torch.tensor([word, word]) for word in counter)
    assert [word.tolist() for word in philox(as_tensors, key)] == [[word] * 2 for word in expected]


def test_bits_depend_on_seed_step_and_offset_alone():
    whole = random_bits(64, seed=7, step=3, offset=0, device=CPU)
    parts = [random_bits(n, seed=7, step=3, offset=o, device=CPU) for o, n in ((0, 24), (24, 40))]
    assert torch.equal(whole, torch.cat(parts))
    for other in ({"seed": 7 + 2**32}, {"step": 4}, {"step": 3 + 2**32}, {"offset": 2**36}):
        key = {"seed": 7, "step": 3, "offset": 0} | other
        assert not torch.equal(whole, random_bits(64, **key, device=CPU)), other


def test_bits_are_uniform():
    bits = random_bits(1 << 18, seed=0, step=0, offset=0, device=CPU)
    assert bits.min() >= 0 and bits.max() < 1 << 16
    counts = torch.bincount(bits >> 8, minlength=256).double()
    chi_square = ((counts - 1024) ** 2 / 1024).sum()
    assert 160 < chi_square < 360  # 255 degrees of freedom: 4.5 standard deviations


def test_an_unaligned_offset_is_refused():
    with pytest.raises(ValueError, match="offset"):
        random_bits(8, seed=0, step=0, offset=4, device=CPU)


def neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """The values of dtype just below and above an fp32 value in magnitude."""
    raw = torch.tensor([value]).to(dtype)
    below = raw
    if abs(raw.item()) > abs(value):
        below = (raw.view(torch.int16) - 1).view(dtype)
    return below.item(), (below.view(torch.int16) + 1).view(dtype).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0003, -3.14159, 6.1e-5, -3.3e-6, 5e-8, 1e-30, 60001.0])
def test_rounding_is_to_a_neighbour_and_unbiased(dtype, value):
    bits = torch.arange(1 << 16, dtype=torch.int32)
    values = torch.full((1 << 16,), value)
    rounded = round_stochastic(values, bits, dtype)
    below, above = neighbours(values[0].item(), dtype)
    assert set(rounded.tolist()) <= {below, above}
    # All 2**16 patterns once: the mean is exact but for the bits beyond the sixteenth.
    mean = rounded.double().mean().item()
    assert abs(mean - values[0].item()) <= abs(above - below) * 2**-16


@settings(max_examples=200)
@given(
    st.floats(width=16, allow_nan=False),
    st.integers(0, 65535),
    st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_representable_values_and_infinities_stay(value, bits, dtype):
    value = torch.tensor([value]).to(dtype)
    rounded = round_stochastic(value.float(), torch.tensor([bits], dtype=torch.int32), dtype)
    assert torch.equal(rounded.view(torch.int16), value.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_of_every_pattern_stays_nan(dtype):
    patterns = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, -(2**22)], dtype=torch.int32)
    for bits in (0, 1, 0xFFFF):
        random = torch.full_like(patterns, bits)
        assert round_stochastic(patterns.view(torch.float32), random, dtype).isnan().all()


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="dtype"):
        round_stochastic(torch.ones(1), torch.zeros(1, dtype=torch.int32), torch.float32)
