"""The distillation objective: its definition, and the fused loss in PyTorch and in Triton."""

from . import reference
from .arguments import Objective, check_scalars
from .loss import (
    distillation_loss,
    linear_distillation_loss,
    linear_loss,
    linear_scratch_bytes,
)
from .reference import DistillationOutput

__all__ = [
    "DistillationOutput",
    "Objective",
    "check_scalars",
    "distillation_loss",
    "linear_distillation_loss",
    "linear_loss",
    "linear_scratch_bytes",
    "reference",
]
