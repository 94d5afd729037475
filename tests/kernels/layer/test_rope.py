"""Head norms, rotary positions and the write into the cache, on both paths: values, what is never
touched, what is refused."""

import math

import pytest
import torch
from kernel_inputs import BACKENDS, DEVICE, FLOATS
from marks import slow
from sodfast_kernels import rope_and_cache

# Of a head's largest element. In 16 bits the PyTorch path rounds at each of four steps.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


def layer_input(tokens=5, heads=3, kv_heads=1, width=16, dtype=torch.float32, gains=True, seed=0):
    """Heads, angles of positions in any order, gains."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, width, generator=generator)
    position = torch.randint(0, 50, (tokens, 1), generator=generator)
    angle = position * 10_000 ** (-torch.arange(width // 2) / (width / 2))
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([-angle.sin(), angle.sin()], 1)
    gain = 1 + 0.3 * torch.randn(heads + kv_heads, width, generator=generator)
    qkv, cos, sin, gain = (x.to(DEVICE, dtype) for x in (qkv, cos, sin, gain))
    return qkv, cos, sin, kv_heads, gain if gains else None


def by_hand(qkv, cos, sin, kv_heads, gain, eps):
    """Queries, keys and values in fp64, a head at a time; rotation by complex numbers."""
    qkv, cos, sin = (x.double().cpu() for x in (qkv, cos, sin))
    rotated, half = qkv.shape[1] - kv_heads, qkv.shape[2] // 2
    out = qkv.clone()
    for t in range(len(qkv)):
        turn = torch.complex(cos[t, :half], sin[t, half:])
        for head in range(rotated):
            x = qkv[t, head]
            if gain is not None:
                x = x / (x.square().mean() + eps).sqrt() * gain[head].double().cpu()
            x = torch.complex(x[:half], x[half:]) * turn
            out[t, head] = torch.cat([x.real, x.imag])
    return out.split([rotated - kv_heads, kv_heads, kv_heads], 1)


def empty_cache(tokens, kv_heads, width, dtype, pages=4, page=5, order=(0, 1, 2, 3)):
    """NaN everywhere; `order`: of the axes [P, page, K, D] in memory. Places all differ."""
    shape = (pages, page, kv_heads, width)
    stored = [torch.full([shape[axis] for axis in order], math.nan) for _ in range(2)]
    inverse = torch.tensor(order).argsort().tolist()
    keys, values = (x.to(DEVICE, dtype).permute(inverse) for x in stored)
    slot = torch.randperm(pages * page, generator=torch.Generator().manual_seed(1))[:tokens]
    return keys, values, (slot // page).to(DEVICE), (slot % page).to(DEVICE)


def close(found, exact, dtype):
    assert found.dtype == dtype
    largest = exact.abs().amax(-1, keepdim=True)
    assert ((found.double().cpu() - exact).abs() <= TOLERANCE[dtype] * largest).all()


def agree(arguments, backend, eps=1e-6, cache=None):
    """Queries and keys are those by hand; a cache has keys and values where they belong and is NaN
    elsewhere."""
    qkv, _, _, kv_heads, gain = arguments
    before = qkv.clone()
    q, k = rope_and_cache(*arguments[:4], gain=gain, eps=eps, cache=cache, backend=backend)
    queries, keys, _ = by_hand(*arguments, eps)
    close(q, queries, qkv.dtype)
    assert qkv.equal(before) and q.stride(2) == 1
    if cache is None:
        assert k is not None and k.stride(2) == 1
        close(k, keys, qkv.dtype)
        return
    assert k is None
    stored_keys, stored_values, page, offset = cache
    close(stored_keys[page, offset], keys, qkv.dtype)
    assert stored_values[page, offset].equal(qkv[:, -kv_heads:])
    written = torch.zeros(stored_keys.shape[:2], dtype=torch.bool, device=DEVICE)
    written[page, offset] = True
    assert stored_keys[~written].isnan().all() and stored_values[~written].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("gains", [True, *slow(False)])
@pytest.mark.parametrize("cached", [True, *slow(False)])
def test_values_of_every_dtype(backend, dtype, gains, cached):
    arguments = layer_input(7, 4, 2, 32, dtype, gains)
    agree(arguments, backend, cache=empty_cache(7, 2, 32, dtype) if cached else None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"),
    [(1, 1, 2), (6, 3, 80), *slow((7, 1, 24), (2, 1, 128), (5, 5, 10))],
)
def test_odd_numbers_of_heads_and_widths(backend, heads, kv_heads, width):
    cache = empty_cache(5, kv_heads, width, torch.float32)
    agree(layer_input(5, heads, kv_heads, width), backend, cache=cache)
    agree(layer_input(5, heads, kv_heads, width, gains=False), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("cached", [True, False])
def test_any_number_of_tokens(backend, tokens, cached):
    cache = empty_cache(tokens, 1, 16, torch.float32) if cached else None
    agree(layer_input(tokens), backend, cache=cache)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 2, 3, 1), (3, 2, 1, 0)])
def test_caches_by_strides(backend, order):
    """Heads before positions; the keys of a CPU's cache, whose positions are adjacent."""
    cache = empty_cache(5, 2, 16, torch.float32, order=order)
    assert not cache[0].is_contiguous()
    agree(layer_input(5, 4, 2), backend, cache=cache)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_and_angles_by_strides(backend):
    qkv, cos, sin, kv_heads, gain = layer_input(6, 4, 2)
    apart = torch.cat((qkv, torch.full_like(qkv, math.nan)), 1)[:, : qkv.shape[1]]
    turned = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    doubled = torch.stack((cos, cos), 2).flatten(1)[:, ::2], torch.cat((sin, sin), 1)[:, :16]
    for heads in (apart, turned):
        assert not heads.is_contiguous()
        agree((heads, *doubled, kv_heads, gain), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_keeps_heads_of_zeros_finite(backend):
    qkv, *rest = layer_input()
    qkv[2] = 0
    agree((qkv * 1e-3, *rest), backend, eps=0.1)
    q, k = rope_and_cache(qkv, *rest[:3], gain=rest[3], backend=backend)
    assert (q[2] == 0).all() and (k[2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gains", [True, False])
def test_nan_stays_in_its_head(backend, gains):
    qkv, cos, sin, kv_heads, gain = layer_input(3, 4, 2, gains=gains)
    qkv[1, 2, 3] = math.nan
    q, k = rope_and_cache(qkv, cos, sin, kv_heads, gain=gain, backend=backend)
    assert q[1, 2].isnan().any() and q.isnan().any(2).sum() == 1 and k.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_tokens_of_one_place(backend):
    """As the idle rows of a batch, which all write to a page that nobody reads."""
    arguments = layer_input(3)
    keys, values, page, offset = empty_cache(3, 1, 16, torch.float32)
    cache = keys, values, page[:1].expand(3), offset[:1].expand(3)
    rope_and_cache(*arguments[:4], gain=arguments[4], cache=cache, backend=backend)
    written = values[page[0], offset[0]]
    assert any(written.equal(arguments[0][t, -1:]) for t in range(3))
    assert values.isfinite().sum() == 16 and keys.isfinite().sum() == 16


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_cache_is_addressed_in_64_bits(backend):
    stride = 1 << 31
    keys, values = (
        torch.empty(stride + 64, dtype=torch.float16, device=DEVICE).as_strided(
            (2, 1, 1, 16), (stride, 16, 16, 1)
        )
        for _ in range(2)
    )
    arguments = layer_input(1, dtype=torch.float16)
    page, offset = torch.tensor([[1], [0]], device=DEVICE)
    rope_and_cache(
        *arguments[:4], gain=arguments[4], cache=(keys, values, page, offset), backend=backend
    )
    close(keys[1, 0], by_hand(*arguments, 1e-6)[1][0], torch.float16)
    assert values[1, 0].equal(arguments[0][0, -1:])


def test_fp64_is_exact_on_the_pytorch_path():
    arguments = layer_input(dtype=torch.float64)
    q, k = rope_and_cache(*arguments[:4], gain=arguments[4], eps=1e-5)
    queries, keys, _ = by_hand(*arguments, 1e-5)
    torch.testing.assert_close(q.cpu(), queries, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(k.cpu(), keys, rtol=1e-12, atol=1e-12)


def test_a_gradient_is_refused():
    qkv, cos, sin, kv_heads, gain = layer_input()
    qkv.requires_grad_()
    with pytest.raises(ValueError, match=r"^qkv must not require a gradient"):
        rope_and_cache(qkv, cos, sin, kv_heads, gain=gain)
    with torch.no_grad():
        assert not rope_and_cache(qkv, cos, sin, kv_heads, gain=gain)[0].requires_grad


def wrong_arguments():
    zeros, ones = torch.zeros, torch.ones
    cache = zeros(4, 5, 1, 16), zeros(4, 5, 1, 16), ones(3).long(), ones(3).long()

    def slots(**wrong):
        names = ("keys", "values", "page", "offset")
        return {"cache": tuple((dict(zip(names, cache, strict=True)) | wrong).values())}

    return [
        ("qkv", {"qkv": zeros(3, 80)}),
        ("qkv", {"qkv": zeros(3, 5, 16).long()}),
        ("qkv", {"qkv": zeros(3, 5, 15)}),
        ("qkv", {"qkv": zeros(3, 5, 0)}),
        ("qkv", {"qkv": zeros(3, 5, 1026)}),
        ("kv_heads", {"kv_heads": 0}),
        ("kv_heads", {"kv_heads": 3}),
        ("kv_heads", {"kv_heads": True}),
        ("cos", {"cos": zeros(3, 1, 16)}),
        ("cos", {"cos": zeros(4, 16)}),
        ("sin", {"sin": zeros(3, 16).half()}),
        ("sin", {"sin": zeros(3, 16, device="meta")}),
        ("gain", {"gain": zeros(5, 16)}),
        ("gain", {"gain": zeros(4, 16).double()}),
        ("eps", {"eps": -1.0}),
        ("eps", {"eps": math.nan}),
        ("cache's keys", slots(keys=zeros(4, 5, 2, 16))),
        ("cache's keys", slots(keys=zeros(4, 5, 1, 16).half())),
        ("cache must have keys", slots(keys=zeros(5, 1, 16))),
        ("cache's values", slots(values=zeros(4, 6, 1, 16))),
        ("cache's page", slots(page=ones(3).int())),
        ("cache's page", slots(page=ones(2).long())),
        ("cache's offset", slots(offset=ones(3, 1).long())),
        ("cache's offset", slots(offset=ones(3, device="meta").long())),
        ("backend", {"backend": "cuda"}),
    ]


@pytest.mark.parametrize(("name", "wrong"), wrong_arguments())
def test_wrong_arguments_are_named(name, wrong):
    def moved(value):
        if isinstance(value, tuple):
            return tuple(moved(entry) for entry in value)
        return value.to(DEVICE) if torch.is_tensor(value) and not value.is_meta else value

    given = {
        "qkv": torch.zeros(3, 5, 16),
        "cos": torch.zeros(3, 16),
        "sin": torch.zeros(3, 16),
        "kv_heads": 1,
    } | wrong
    with pytest.raises(ValueError, match=f"^{name} "):
        rope_and_cache(**{key: moved(value) for key, value in given.items()})
