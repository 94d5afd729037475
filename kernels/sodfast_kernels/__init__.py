"""Fused distillation objective, teacher updates, optimizer, sampling, attention for decoding and
what lies between a layer's products; triton for CUDA only.

`reference` is the definition of the objective in plain PyTorch; `modules` has the loss in the shape
that trainers expect.
"""

from . import modules
from .attention import decode_attention
from .distillation import (
    DistillationOutput,
    distillation_loss,
    linear_distillation_loss,
    linear_scratch_bytes,
    reference,
)
from .layer import rope_and_cache, silu_and_mul
from .parameters import AdamW, ParameterUpdate, copy_teacher_, ema_update_, parameter_distance
from .sampling import SampledTokens, gumbel_noise, sample_tokens
from .speculation import find_drafts

__all__ = [
    "AdamW",
    "DistillationOutput",
    "ParameterUpdate",
    "SampledTokens",
    "copy_teacher_",
    "decode_attention",
    "distillation_loss",
    "ema_update_",
    "find_drafts",
    "gumbel_noise",
    "linear_distillation_loss",
    "linear_scratch_bytes",
    "modules",
    "parameter_distance",
    "reference",
    "rope_and_cache",
    "sample_tokens",
    "silu_and_mul",
]
