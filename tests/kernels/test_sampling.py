"""Sampling: distribution, key, truncation and statistics; the Triton kernel against PyTorch."""

import math

import pytest
import torch
from sodfast_kernels import gumbel_noise, sample_tokens
from sodfast_kernels.philox import WORD, philox

INF, NAN = math.inf, math.nan


def keys(rows, position=0):
    return {
        "seed": 2**63 + 11,
        "step": 7,
        "sample": torch.arange(rows),
        "position": torch.full((rows,), position),
    }


def draws(logits, count, **given):
    """`count` tokens of one row of logits, one for each sample."""
    return sample_tokens(logits.expand(count, -1), **keys(count), **given).token


def chi_square(tokens, probs):
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    expected = len(tokens) * probs
    assert counts[probs == 0].sum() == 0
    drawn = probs > 0
    return ((counts - expected)[drawn] ** 2 / expected[drawn]).sum().item(), int(drawn.sum()) - 1


def nucleus(logits, temperature, top_p, top_k):
    """The distribution by hand, in fp64: loops over the tokens from the most probable down."""
    probs = (logits.double() / temperature).softmax(0).tolist()
    order = sorted(range(len(probs)), key=lambda v: (-logits[v].item(), v))[:top_k]
    total, before, kept = sum(probs[v] for v in order), 0.0, {}
    for v in order:
        if before < top_p * total:
            kept[v] = probs[v]
        before += probs[v]
    mass = sum(kept.values())
    return torch.tensor([kept.get(v, 0.0) / mass for v in range(len(probs))], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, None), (0.8, None), (1.0, 5), (0.7, 9)])
def test_tokens_follow_the_distribution(temperature, top_p, top_k):
    logits = torch.randn(24, generator=torch.Generator().manual_seed(1))
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    statistic, freedom = chi_square(draws(logits, 100_000, **given), nucleus(logits, **given))
    # Mean f, variance 2f; 5 standard deviations: one false alarm in 10^5 seeds, and ours is fixed.
    assert freedom > 0 and statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_noise_is_the_documented_function_of_the_key():
    noise = gumbel_noise(
        seed=2**63 + 5, step=3, sample=torch.tensor([7]), position=torch.tensor([9]), vocabulary=6
    )
    words = [
        philox((group, 9, 7, 3), 2**63 + 5)[word] for group, word in [(0, i) for i in range(4)]
    ]
    words += [philox((1, 9, 7, 3), 2**63 + 5)[word] for word in range(2)]
    exact = [-math.log(-math.log1p(-(word + 0.5) / 2**32)) for word in words]
    torch.testing.assert_close(noise[0], torch.tensor(exact), rtol=1e-6, atol=1e-6)


def test_statistics_are_those_of_the_untruncated_softmax():
    logits = 3 * torch.randn(5, 5000, generator=torch.Generator().manual_seed(2))
    out = sample_tokens(logits, **keys(5), temperature=0.7, top_p=0.5, top_k=40)
    exact = (logits.double() / 0.7).log_softmax(1)
    torch.testing.assert_close(
        out.logprob.double(), exact.gather(1, out.token[:, None])[:, 0], rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        out.entropy.double(), -(exact.exp() * exact).sum(1), rtol=1e-6, atol=1e-6
    )


def test_a_draw_depends_on_its_key_and_row_alone():
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(3))
    given = keys(9, position=4)
    whole = sample_tokens(logits, **given, top_p=0.9)
    order = torch.tensor([7, 2, 5])
    part = given | {"sample": given["sample"][order], "position": given["position"][order]}
    for one, other in zip(whole, sample_tokens(logits[order], **part, top_p=0.9), strict=True):
        assert torch.equal(one[order], other)
    noise = gumbel_noise(**given, vocabulary=50)
    ahead = sample_tokens(logits, **given, noise=noise, top_p=0.9)
    assert torch.equal(whole.token, ahead.token)
    assert WORD == 2**32 - 1
