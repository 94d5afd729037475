"""The cross-entropy that is added to a tile, against PyTorch in fp64."""

import pytest
import torch
import torch.nn.functional as F
from kernel_inputs import DEVICE
from marks import slow
from sodfast_kernels.distillation.arguments import Call, Settings, Sides, Tokens
from sodfast_kernels.distillation.row_launch import launch_cross_entropy

pytestmark = pytest.mark.triton
SETTINGS = Settings(0.5, 2.0, None, None, True, 0.2, 0.28, None, None, True, None)
ROWS, PAD = 4, 16


def tile(vocabulary: int, dtype: torch.dtype = torch.float32):
    """Logits and d-logits of rows whose padding is NaN, and the call that they belong to. The first
    row has no weight, and NaN for logits."""
    generator = torch.Generator().manual_seed(vocabulary)
    width = -(-vocabulary // PAD) * PAD
    logits = torch.full((ROWS, width), torch.nan)
    logits[1:, :vocabulary] = 3 * torch.randn(ROWS - 1, vocabulary, generator=generator)
    d_logits = torch.randn(ROWS, width, generator=generator).to(DEVICE, dtype)
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0], device=DEVICE)
    target = torch.tensor([1, 0, vocabulary // 2, vocabulary - 1], device=DEVICE)
    upstream = torch.tensor([1.0, 1.0, -3.0, 0.5], device=DEVICE)
    logits = logits.to(DEVICE)
    sides = Sides(logits[:, :vocabulary], None, logits[:, :vocabulary], None, None, None)
    tokens = Tokens(weight, target, None, weight, None)
    return logits, d_logits, Call(sides, tokens, SETTINGS, upstream, True, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [33, 1024, *slow(1, 3001)])
def test_adds_to_loss_and_gradient(vocabulary, dtype):
    logits, d_logits, call = tile(vocabulary, dtype)
    before, stats = d_logits.clone(), torch.ones(6, ROWS, device=DEVICE)
    launch_cross_entropy(call, slice(0, ROWS), logits, d_logits, stats)

    exact = logits[1:, :vocabulary].double().requires_grad_()
    loss = call.tokens.policy_weight[1:] * F.cross_entropy(
        exact, call.tokens.target_ids[1:], reduction="none"
    )
    (loss * call.upstream[1:]).sum().backward()
    torch.testing.assert_close(stats[0, 1:].double(), 1 + loss, rtol=1e-6, atol=1e-6)
    expected = before[1:, :vocabulary].double() + exact.grad
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(d_logits[1:, :vocabulary], expected.to(dtype), **tolerance)
    # The row without a weight and the other statistics are as they were.
    assert torch.equal(d_logits[0], before[0]) and stats[0, 0] == 1 and (stats[1:] == 1).all()


def test_the_loss_alone_where_no_gradient_is_wanted():
    logits, d_logits, call = tile(33)
    both, alone = torch.zeros(2, 6, ROWS, device=DEVICE)
    launch_cross_entropy(call, slice(0, ROWS), logits, d_logits, both)
    launch_cross_entropy(call, slice(0, ROWS), logits, None, alone)
    assert torch.equal(both, alone) and alone[0, 1:].all()


def test_a_label_that_the_student_masks_has_an_infinite_loss_and_a_finite_gradient():
    """As in PyTorch: softmax minus one-hot."""
    logits, d_logits, call = tile(33)
    logits[2, call.tokens.target_ids[2]] = -torch.inf
    d_logits.zero_()
    stats = torch.zeros(6, ROWS, device=DEVICE)
    launch_cross_entropy(call, slice(0, ROWS), logits, d_logits, stats)
    assert stats[0, 2] == torch.inf
    one_hot = F.one_hot(call.tokens.target_ids[2], 33)
    expected = -3 * (logits[2, :33].softmax(-1) - one_hot)
    torch.testing.assert_close(d_logits[2, :33], expected, rtol=1e-5, atol=1e-6)
