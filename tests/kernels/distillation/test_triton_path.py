"""Tiles and slabs around the row kernel."""

import pytest
import torch
from kernel_inputs import DEVICE
from sodfast_kernels import linear_distillation_loss, reference
from sodfast_kernels.distillation import triton_path

pytestmark = pytest.mark.triton
N, H, V = 7, 2, 45


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, H), (V, H), (N, H + 1), (V, H + 1))
    return [torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def run(function, given, dtype=torch.float32, **extra):
    hidden, head, *teacher = (tensor.to(dtype) for tensor in given)
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    output = function(hidden, head, *teacher, target_ids=torch.arange(N, device=DEVICE), **extra)
    upstream = torch.linspace(1, 2, N, device=DEVICE) if extra.get("reduction") == "none" else 1.0
    (output.loss * upstream).sum().backward()
    return [*output, hidden.grad, head.grad]


@pytest.mark.parametrize(
    "dtype, floor",
    [
        (torch.float32, 1e-5),
        pytest.param(torch.bfloat16, 6e-3, marks=pytest.mark.slow),
        pytest.param(torch.float16, 2e-3, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("tile, slab_tokens", [(512, 100), (2, 2)])
def test_tiles_and_slabs(monkeypatch, dtype, floor, tile, slab_tokens):
    monkeypatch.setattr(triton_path, "TILE_ROWS", tile)
    given = [tensor.to(dtype) for tensor in tensors()]
    if slab_tokens == 2:  # 2H = 4 rows: two slabs of two tiles, the last one short
        assert triton_path._ceil(N, 2 * H) == 2
    for extra in ({}, {"top_k": 7, "reduction": "none"}):
        exact = run(reference.linear_distillation_loss, given, torch.float64, **extra)
        ours = run(linear_distillation_loss, given, dtype, backend="triton", **extra)
        for actual, expected in zip(ours, exact, strict=True):
            error = (actual.double() - expected).norm() / expected.norm()
            assert error < floor


def test_a_smaller_scratch_gives_the_same_and_too_small_a_one_is_refused():
    given = tensors()
    plenty = run(linear_distillation_loss, given, backend="triton")
    little = run(linear_distillation_loss, given, backend="triton", max_scratch_bytes=3000)
    for actual, expected in zip(little, plenty, strict=True):
        torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="max_scratch_bytes"):
        run(linear_distillation_loss, given, backend="triton", max_scratch_bytes=300)


def test_the_factor_scales_in_place_and_rounds_to_nearest_even():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(9001, generator=generator).to(DEVICE).bfloat16()
    factor = torch.tensor(1.2345, device=DEVICE)
    expected = (values.float() * factor).bfloat16()
    scaled = triton_path.scale_(values, factor)
    assert scaled.data_ptr() == values.data_ptr()
    assert torch.equal(scaled, expected)
    before = scaled.clone()
    assert torch.equal(triton_path.scale_(scaled, torch.ones_like(factor)), before)


def on_gpu(device: str) -> list[torch.Tensor]:
    return [tensor.to(device).bfloat16() for tensor in tensors()]


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    hidden, head, *teacher = on_gpu("cuda")
    ids = torch.arange(N, device="cuda")

    def step():
        leaf = hidden.clone().requires_grad_()
        linear_distillation_loss(leaf, head, *teacher, target_ids=ids, top_k=7).loss.backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0):
        first, second = (
            run_on(device, linear_distillation_loss) for device in ("cuda:0", "cuda:1")
        )
    torch.testing.assert_close(first.cpu(), second.cpu())


def run_on(device, function):
    hidden, head, *teacher = on_gpu(device)
    leaf = hidden.clone().requires_grad_()
    function(leaf, head, *teacher).loss.backward()
    return leaf.grad
