"""Drawing tokens from rows of logits, each draw a function of its own key."""

from .draw import SampledTokens, gumbel_noise, sample_tokens

__all__ = ["SampledTokens", "gumbel_noise", "sample_tokens"]
