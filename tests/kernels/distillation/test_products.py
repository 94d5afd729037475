"""Products summed in fp32, and fp32 d-logits as two fp16 numbers, against fp64."""

import pytest
import torch
from kernel_inputs import DEVICE
from sodfast_kernels.distillation import products
from torch import Tensor

S, V, H = 24, 700, 32
MATMUL = torch.backends.cuda.matmul
NAMES = [f"{name}{end}" for name in products.REDUCTIONS for end in ("", "_split_k")]
FLAGS = [*NAMES, "allow_fp16_accumulation"]


def flags() -> dict[str, bool]:
    return {name: getattr(MATMUL, name) for name in FLAGS}


@pytest.fixture(params=[(True, True), (False, True), (False, False)], ids=str)
def chosen(request):
    """Flags of a user, put back afterwards."""
    before = flags()
    MATMUL.allow_fp16_accumulation = request.param[0]
    for name in products.REDUCTIONS:
        setattr(MATMUL, name, request.param)
    yield flags()
    MATMUL.allow_fp16_accumulation = before["allow_fp16_accumulation"]
    for name in products.REDUCTIONS:
        setattr(MATMUL, name, (before[name], before[f"{name}_split_k"]))
    assert flags() == before


def test_no_sum_in_16_bits_and_the_flags_are_put_back(chosen):
    with products.summed_in_fp32():
        inside = flags()
    assert not any(inside[name] for name in (*products.REDUCTIONS, "allow_fp16_accumulation"))
    assert all(inside[name] == chosen[name] for name in FLAGS if name.endswith("split_k"))
    assert flags() == chosen


def test_the_flags_are_put_back_after_an_exception(chosen):
    with pytest.raises(ZeroDivisionError), products.summed_in_fp32():
        raise ZeroDivisionError
    assert flags() == chosen


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def gradients(d_logits, head, hidden, block=S):
    """Both gradients in fp32, in slabs of `block` rows, over memory full of NaN."""
    d_hidden = torch.full((len(d_logits), H), torch.nan, device=DEVICE)
    d_head = torch.full((V, H), torch.nan, device=DEVICE)
    for first in range(0, len(d_logits), block):
        part = slice(first, first + block)
        products.multiply_gradients(
            d_logits[part], head, hidden[part], d_hidden[part], d_head, is_first=first == 0
        )
    return d_hidden, d_head


def exact(d_logits, head, hidden):
    d_logits, head, hidden = (tensor.double() for tensor in (d_logits, head, hidden))
    return d_logits @ head, d_logits.T @ hidden


@pytest.fixture
def fp16():
    return normal(V, H, seed=1).half(), normal(S, H, seed=2).half()


@pytest.mark.parametrize("size", [1e-37, 1e-20, 1e-9, 1.0, 1e30])
@pytest.mark.parametrize("block", [S, 7])
def test_fp16_gradients_are_as_exact_as_in_fp32(monkeypatch, fp16, size, block):
    monkeypatch.setattr(products, "SPLIT_COLUMNS", 256)  # three blocks, the last one short
    # Entries of very different sizes, most of them beyond the range of fp16.
    d_logits = size * normal(S, V) * torch.exp(2 * normal(S, V, seed=3) - 10)
    ours = gradients(d_logits, *fp16, block)
    # A GPU's fp16 products cut their sums off after every few terms: that alone is up to 1e-6.
    floor = 2e-6 if DEVICE.type == "cuda" else 2e-7
    head, hidden = fp16
    plain = d_logits @ head.float(), d_logits.T @ hidden.float()
    for actual, reference, expected in zip(ours, plain, exact(d_logits, *fp16), strict=True):
        error, unavoidable = (
            (found.double() - expected).norm() / expected.norm() for found in (actual, reference)
        )
        assert error <= 2 * unavoidable + floor


def test_rows_and_columns_a_million_times_smaller_keep_their_precision(fp16):
    """A token of little weight among others, and a word that nobody expects."""
    rows = torch.logspace(0, -6, S, device=DEVICE)[:, None]
    columns = torch.logspace(0, -6, V, device=DEVICE)
    d_logits = 1e-6 * rows * columns[torch.randperm(V)] * (1 + normal(S, V).abs())
    for actual, expected in zip(gradients(d_logits, *fp16), exact(d_logits, *fp16), strict=True):
        error = (actual.double() - expected).norm(dim=1) / expected.norm(dim=1)
        assert error.max() < 1e-5


def test_both_halves_are_fp16_and_keep_22_bits():
    d_logits = normal(S, V) * torch.exp(3 * normal(S, V, seed=3)) * 1e-12
    scale = products._split_scale(d_logits)
    mantissa, _ = torch.frexp(scale)
    scaled = d_logits.double() * scale.double()
    assert mantissa == 0.5 and 2**14 <= scaled.abs().max() < 2**15
    high, low = products._split(d_logits, scale)
    assert high.dtype == low.dtype == torch.float16
    error = (high.double() + low.double() / 2**11 - scaled).abs()
    assert (error <= torch.clamp(2.0**-22 * scaled.abs(), min=2.0**-36)).all()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_row_breaks_no_other(fp16, broken):
    d_logits = normal(S, V)
    d_logits[3, 5] = broken
    found, whole = gradients(d_logits, *fp16)[0], gradients(normal(S, V), *fp16)[0]
    others = torch.arange(S, device=DEVICE) != 3
    assert not found[3].isfinite().any()
    torch.testing.assert_close(found[others], whole[others])


def test_no_gradient_at_all_is_exactly_none(fp16):
    assert not any(found.any() for found in gradients(torch.zeros(S, V, device=DEVICE), *fp16))


def test_bf16_slabs_are_summed_in_fp32():
    tensors = [t.bfloat16() for t in (normal(S, V), normal(V, H, seed=1), normal(S, H, seed=2))]
    d_logits, head, hidden = tensors
    d_hidden = torch.full((S, H), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    d_head = torch.full((V, H), torch.nan, device=DEVICE)
    for first in range(0, S, 8):
        part = slice(first, first + 8)
        products.multiply_gradients(
            d_logits[part], head, hidden[part], d_hidden[part], d_head, is_first=first == 0
        )
    exact_hidden, exact_head = exact(d_logits, head, hidden)
    assert (d_hidden.double() - exact_hidden).norm() < 3e-3 * exact_hidden.norm()
    assert (d_head.double() - exact_head).norm() < 1e-6 * exact_head.norm()


def test_what_is_not_wanted_is_not_computed(fp16):
    d_hidden = torch.empty(S, H, device=DEVICE)
    d_head = torch.empty(V, H, device=DEVICE)
    d_logits = normal(S, V)
    products.multiply_gradients(d_logits, *fp16, d_hidden, None, is_first=True)
    products.multiply_gradients(d_logits, *fp16, None, d_head, is_first=True)
    for alone, both in zip((d_hidden, d_head), gradients(d_logits, *fp16), strict=True):
        torch.testing.assert_close(alone, both, rtol=0, atol=0)
