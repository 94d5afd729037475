"""From rows of logits to divergences and their slopes in PyTorch, in as few tiles as it takes:
softmaxes, entropies, buckets. Names that end in an underscore overwrite an argument.

Suffixes: n rows of one tile, V vocabulary, K kept tokens, B buckets (K, or K + 1 with the tail, or
V).
"""

import math

import torch
from torch import Tensor

from .reference import TAIL_FLOOR, top_ids

# −inf logits become this, so that no difference or product of theirs is NaN.
MASKED, MASKED_BELOW = -1e30, -1e28


def softcap_(logits_nV: Tensor, softcap: float | None) -> Tensor | None:
    """Caps in place; returns the derivative 1 − tanh²."""
    if softcap is None:
        return None
    overflowed = logits_nV == math.inf
    logits_nV.div_(softcap).tanh_()
    slope_nV = 1 - logits_nV.square()
    # tanh would turn an overflowed logit into an ordinary number.
    logits_nV.mul_(softcap).masked_fill_(overflowed, math.nan)
    return slope_nV


def log_softmax_(logits_nV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs, in place, and probs."""
    if temperature != 1:
        logits_nV.div_(temperature)
    logits_nV.clamp_(min=MASKED)
    top = logits_nV.amax(-1, keepdim=True)
    logits_nV.sub_(top.masked_fill_(top < MASKED_BELOW, math.nan))
    p_nV = logits_nV.exp()
    total = p_nV.sum(-1, keepdim=True)
    return logits_nV.sub_(total.log()), p_nV.div_(total)


def entropy_of(log_p_nB: Tensor, p_nB: Tensor) -> Tensor:
    return torch.einsum("nb,nb->n", log_p_nB, p_nB).neg_()


def greatest_ids(logits_nV: Tensor, k: int) -> Tensor:
    """Ids [n, k] of the greatest logits, the lower index among equal ones."""
    if logits_nV.dtype != torch.float32:
        return top_ids(logits_nV, k)
    # One integer orders both: the value's bits, made monotone, above the complement of the index.
    # Adding zero first turns −0 into +0.
    bits = (logits_nV + 0.0).view(torch.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    key = bits.to(torch.int64) << 32
    key -= torch.arange(key.shape[1], device=key.device)
    return key.topk(k, dim=-1).indices


def buckets_(
    log_p_nV: Tensor, p_nV: Tensor, ids_nK: Tensor, add_tail: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log mass and mass of each bucket, and the kept probs, which are zeroed in `p_nV`."""
    log_kept_nK, kept_nK = log_p_nV.gather(-1, ids_nK), p_nV.gather(-1, ids_nK)
    p_nV.scatter_(-1, ids_nK, 0)
    if not add_tail:
        log_kept_nK -= log_kept_nK.logsumexp(-1, keepdim=True)
        return log_kept_nK, log_kept_nK.exp(), kept_nK
    tail = p_nV.sum(-1, keepdim=True).clamp_(min=TAIL_FLOOR)
    return torch.cat([log_kept_nK, tail.log()], -1), torch.cat([kept_nK, tail], -1), kept_nK


def divergence_and_slope_(
    log_s_nB: Tensor, s_nB: Tensor, log_q_nB: Tensor, q_nB: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """D [n] and s·g [n, B], g = ∂D/∂s; overwrites `log_q_nB`.

    Everything is built from δ = log q − log s and expm1(−|δ|), so nothing overflows, an error in a
    log-sum-exp enters only to second order, and s = q gives exactly 0.
    """
    infinite = None
    if alpha in (0, 1):
        absent, present = (log_s_nB, log_q_nB) if alpha == 0 else (log_q_nB, log_s_nB)
        masked = absent < MASKED_BELOW
        if bool(masked.any()):
            infinite = (masked & (present > MASKED_BELOW)).any(-1)
    delta_nB = log_q_nB.sub_(log_s_nB)
    shrink_nB = delta_nB.abs().neg_().expm1_()
    if 0 < alpha < 1:
        # log m − max(log s, log q)
        if alpha == 0.5:
            shrink_nB *= alpha
        else:
            shrink_nB.mul_((delta_nB > 0).to(shrink_nB.dtype).mul_(1 - 2 * alpha).add_(alpha))
        log_mix_nB = shrink_nB.log1p_()
        from_q_nB = delta_nB.clamp(max=0).sub_(log_mix_nB).mul_(q_nB).mul_(alpha)
        slope_s_nB = delta_nB.clamp_(min=0).add_(log_mix_nB).mul_(s_nB).mul_(alpha - 1)
        divergence = from_q_nB.add_(slope_s_nB).sum(-1)
    else:
        # q − s, exact also where they nearly agree
        excess_nB = shrink_nB.mul_(torch.maximum(s_nB, q_nB)).copysign_(delta_nB)
        if alpha == 0:
            divergence = delta_nB.mul_(q_nB).sub_(excess_nB).sum(-1)
            slope_s_nB = excess_nB.neg_()
        else:
            slope_s_nB = delta_nB.mul_(s_nB).neg_()
            divergence = excess_nB.add_(slope_s_nB).sum(-1)
    divergence.clamp_(min=0)
    if infinite is not None:
        divergence.masked_fill_(infinite & ~divergence.isnan(), math.inf)
    return divergence, slope_s_nB
