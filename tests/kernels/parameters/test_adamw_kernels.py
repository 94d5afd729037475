"""The Triton kernels of AdamW give the bits of the PyTorch path (interpreter or GPU)."""

import pytest
import torch
from kernel_inputs import DEVICE, FLOATS, HUGE_SEED, tensors
from marks import slow
from sodfast_kernels import ema_update_
from sodfast_kernels.parameters.adamw import AdamW
from torch import nn

pytestmark = pytest.mark.triton
# The first two take every path of the kernels between them.
COMBINATIONS = [
    ("8bit", torch.bfloat16),
    ("exact", torch.bfloat16),
    *slow(*(("8bit", dtype) for dtype in FLOATS if dtype != torch.bfloat16)),
    *slow(*(("fp32", dtype) for dtype in FLOATS)),
    *slow(("exact", torch.float32)),
]


@pytest.mark.parametrize(("state", "dtype"), COMBINATIONS)
def test_adamw_gives_the_bits_of_the_pytorch_path(state, dtype):
    def train(backend):
        params = [nn.Parameter(0.02 * value.nan_to_num(1, 1, 1)) for value in tensors(0, dtype)]
        optimizer = AdamW(
            params, 1e-3, (0.9, 0.99), 1e-8, 0.1, state=state, seed=HUGE_SEED, backend=backend
        )
        norms = []
        for step in range(3):
            for param, gradient in zip(params, tensors(10 + step, dtype), strict=True):
                # Within the squares that fp32 holds, and with parameters that lack a gradient.
                param.grad = (1e-3 * gradient.nan_to_num(1, 1, 1)).clamp(-1e3, 1e3)
            params[2].grad = None if step == 1 else params[2].grad
            norms.append(optimizer.step(clip_norm=0.5))
        states = [value for p in params for value in optimizer.state[p].values()]
        return [p.detach() for p in params], states, norms

    torch_results, first, second = train("torch"), train("triton"), train("triton")
    for values, expected in zip(first, torch_results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
    for values, expected in zip(second, first, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
    assert all(value.isfinite().all() for value in first[0])


@pytest.mark.parametrize("state", ["8bit", "fp32", "exact"])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_norm(state):
    param = nn.Parameter(torch.ones(300, dtype=torch.bfloat16, device=DEVICE))
    optimizer = AdamW([param], 1e-1, state=state, backend="triton")
    param.grad = torch.full_like(param, 0.5)
    optimizer.step()
    before = param.detach().clone(), optimizer.state[param]["exp_avg"].clone()
    assert not torch.equal(before[0], torch.ones_like(param))
    param.grad = torch.full_like(param, 0.5)
    param.grad[299] = float("nan")
    assert optimizer.step(clip_norm=1.0).isnan()
    assert torch.equal(param, before[0])
    assert torch.equal(optimizer.state[param]["exp_avg"], before[1])


def test_in_place_updates_are_seen_by_autograd():
    weight = nn.Parameter(torch.ones(3, device=DEVICE))
    loss = (weight * weight).sum()
    weight.grad = torch.ones_like(weight)
    AdamW([weight], 0.1, backend="triton").step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.gpu
def test_an_update_on_the_gpu_never_waits():
    params = [nn.Parameter(torch.ones(64, 64, device="cuda", dtype=torch.bfloat16))]
    optimizer = AdamW(params, 1e-3)
    for step in range(2):  # the first call compiles
        params[0].grad = torch.ones_like(params[0])
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step(clip_norm=1.0)
            ema_update_([params[0].detach().clone()], params, 0.1, step=step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
