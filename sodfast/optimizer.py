"""AdamW, its warm-up, and one clipped update that refuses to step on a NaN."""

from typing import cast

import torch
from torch import Tensor, nn

from sodfast.config import OptimizerConfig
from sodfast.errors import RunFailed


def build_optimizer(config: OptimizerConfig, network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        network.parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Linear warm-up over the first `warmup_steps` steps (1, 2, …), constant afterwards."""
    return config.lr * min(1.0, step / config.warmup_steps) if config.warmup_steps else config.lr


def update(optimizer: torch.optim.Optimizer, lr: float, clip_norm: float, loss: Tensor) -> float:
    """Clip the accumulated gradients to a global norm and step; returns the norm before clipping.

    Raises `RunFailed` when loss or gradient is not finite, before any parameter has moved.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        if parameter.grad is None:  # no rollout of this update carried a gradient
            parameter.grad = torch.zeros_like(parameter)
    norm = torch.nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters])
    if not (torch.isfinite(loss) & torch.isfinite(norm)):
        raise RunFailed(f"loss {float(loss)}, gradient norm {float(norm)}: the update was not made")
    torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)
