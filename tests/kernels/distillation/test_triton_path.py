"""Tiles and slabs around the row kernel."""

import pytest
import torch
from kernel_inputs import DEVICE
from marks import slow
from sodfast_kernels import linear_distillation_loss, reference
from sodfast_kernels.distillation import row_launch, triton_path
from sodfast_kernels.distillation.arguments import Call, Settings, Sides, Tokens

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
        *slow((torch.bfloat16, 6e-3), (torch.float16, 2e-3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("tile, slab_tokens", [(512, 100), *slow((2, 2))])
def test_tiles_and_slabs(monkeypatch, dtype, floor, tile, slab_tokens):
    monkeypatch.setattr(triton_path, "TILE_ROWS", tile)
    given = [tensor.to(dtype) for tensor in tensors()]
    sides, settings = sides_and_settings(N, H, V, dtype)
    shape = triton_path._tile_and_slab(sides, settings, True, True)
    # 2H = 4 rows at most: two slabs, the last one short; of two tiles each, or of one.
    assert shape == (min(tile, 4), 4)
    for extra in ({}, {"top_k": 7, "reduction": "none"}):
        exact = run(reference.linear_distillation_loss, given, torch.float64, **extra)
        ours = run(linear_distillation_loss, given, dtype, backend="triton", **extra)
        for actual, expected in zip(ours, exact, strict=True):
            error = (actual.double() - expected).norm() / expected.norm()
            assert error < floor


def sides_and_settings(rows, hidden, vocabulary, dtype=torch.bfloat16, limit=None):
    """Of tensors whose memory is never touched."""
    head, state = (torch.empty(n, hidden, dtype=dtype) for n in (vocabulary, rows))
    settings = Settings(0.5, 1.0, None, None, True, 0.2, 0.28, None, None, True, limit)
    return Sides(state, head, state, head, None, None), settings


def parts(rows, size):
    return [min(size, rows - first) for first in range(0, rows, size)]


@pytest.mark.parametrize(
    "rows", [1, 17, 513, 2048, 4095, 4097, *slow(8192, 8193, 10_001, 16_385, 40_961)]
)
@pytest.mark.parametrize("want_head", [True, False])
def test_slabs_and_tiles_are_of_nearly_equal_size(monkeypatch, rows, want_head):
    sides, settings = sides_and_settings(rows, 4096, 500)
    tile, slab = triton_path._tile_and_slab(sides, settings, True, want_head)
    slabs = parts(rows, slab)
    assert len(slabs) == (-(-rows // 8192) if want_head else max(1, rows // 2048))
    # What `evaluate` cuts a slab into.
    launched = []
    monkeypatch.setattr(triton_path, "_tile", lambda _, part, *__: launched.append(part))
    monkeypatch.setattr(triton_path, "multiply_gradients", lambda *_, **__: None)
    weight = torch.ones(rows)
    call = Call(sides, Tokens(weight, None, None, None, None), settings, None, True, want_head)
    triton_path.evaluate(call)
    assert [part.start for part in launched] == [0, *(part.stop for part in launched[:-1])]
    assert launched[-1].stop == rows
    tiles = [
        [p.stop - p.start for p in launched if p.start // slab == n] for n in range(len(slabs))
    ]
    assert [sum(sizes) for sizes in tiles] == slabs
    for sizes in (slabs, *tiles):
        # All but the last are whole multiples of 16 rows, which the last one pays for.
        assert sizes[-1] > sizes[0] - 16 * len(sizes)
        assert len(sizes) == 1 or sizes[0] % 16 == 0
    assert all(len(sizes) <= -(-slab // 512) and max(sizes) <= tile <= 512 for sizes in tiles)


@pytest.mark.parametrize("rows", [2048, 4097, 8191, 16_384])
def test_a_frozen_heads_slabs_fill_a_gpu_and_take_no_more_than_two_of_the_least(rows):
    sides, settings = sides_and_settings(rows, 4096, 151_936)
    _, slab = triton_path._tile_and_slab(sides, settings, True, False)
    assert 2048 <= slab < 4096
    assert triton_path._tile_and_slab(sides, settings, True, True)[1] >= slab


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("want_head", [True, False])
def test_every_bound_on_scratch_is_kept_or_refused(dtype, want_head):
    for limit in (2**exponent for exponent in range(12, 34)):
        sides, settings = sides_and_settings(5000, 64, 20_000, dtype, limit)
        try:
            tile, slab = triton_path._tile_and_slab(sides, settings, True, want_head)
        except ValueError:
            one = triton_path._scratch(1, 1, sides, settings, True, want_head)
            assert one > limit
        else:
            assert triton_path._scratch(tile, slab, sides, settings, True, want_head) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_rows_give_zeros(dtype):
    hidden, head = torch.empty(0, H, dtype=dtype), torch.ones(V, H, dtype=dtype)
    hidden, head = (t.to(DEVICE).requires_grad_() for t in (hidden, head))
    linear_distillation_loss(hidden, head, hidden, head, backend="triton").loss.backward()
    assert hidden.grad.shape == (0, H) and not head.grad.any()


@pytest.mark.parametrize("sides", ["hidden", *slow("head")])
def test_the_gradient_of_one_side_alone_is_the_same(monkeypatch, sides):
    monkeypatch.setattr(triton_path, "FROZEN_SLAB_ROWS", 3)
    hidden, head, *teacher = tensors()
    both = run(linear_distillation_loss, [hidden, head, *teacher], backend="triton")
    leaf = hidden if sides == "hidden" else head
    leaf.requires_grad_()
    linear_distillation_loss(
        hidden, head, *teacher, target_ids=torch.arange(N, device=DEVICE), backend="triton"
    ).loss.backward()
    torch.testing.assert_close(leaf.grad, both[-2 if sides == "hidden" else -1])


def test_products_are_summed_in_fp32_and_the_setting_is_put_back(monkeypatch):
    """Also where the call fails."""
    flag = "allow_bf16_reduced_precision_reduction"
    matmul, seen = torch.backends.cuda.matmul, []
    assert getattr(matmul, flag)

    def multiply(*_, **__):
        seen.append(getattr(matmul, flag))
        raise ZeroDivisionError

    monkeypatch.setattr(triton_path, "multiply", multiply)
    with pytest.raises(ZeroDivisionError):
        run(linear_distillation_loss, tensors(), backend="triton")
    assert seen == [False] and getattr(matmul, flag)


def test_a_smaller_scratch_gives_the_same_and_too_small_a_one_is_refused():
    given = tensors()
    plenty = run(linear_distillation_loss, given, backend="triton")
    little = run(linear_distillation_loss, given, backend="triton", max_scratch_bytes=3000)
    for actual, expected in zip(little, plenty, strict=True):
        torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="max_scratch_bytes"):
        run(linear_distillation_loss, given, backend="triton", max_scratch_bytes=300)


@pytest.mark.parametrize("programs", [row_launch.SCALE_PROGRAMS, 1])
def test_the_factor_scales_in_place_and_rounds_to_nearest_even(monkeypatch, programs):
    """With one program only, all but the first block are its further turns."""
    monkeypatch.setattr(row_launch, "SCALE_PROGRAMS", programs)
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
