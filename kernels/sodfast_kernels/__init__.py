"""Fused kernels for self-distillation, usable alone: needs torch, and triton for CUDA only."""

from sodfast_kernels.parameters import copy_teacher_, ema_update_, parameter_distance

__all__ = ["copy_teacher_", "ema_update_", "parameter_distance"]
