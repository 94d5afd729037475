"""AdamW, its warm-up, and one clipped update that refuses to step on a NaN.

Gradients have the dtype of the weights. With bfloat16 a micro-batch's products are summed in fp32,
but autograd rounds the running sum over the micro-batches to nearest; AdamW computes in fp32.
"""

from typing import cast

import sodfast_kernels
import torch
from sodfast_kernels.parameters import BLOCK
from sodfast_kernels.philox import GROUP
from torch import Tensor

from sodfast.config import OptimizerConfig
from sodfast.errors import RunFailed
from sodfast.parallel.fsdp import Weights
from sodfast.rng import Stream, draw_key


def build_optimizer(
    config: OptimizerConfig, weights: Weights, seed: int = 0
) -> torch.optim.Optimizer:
    """The AdamW that `config.adamw` names. `seed`: the run's, for what is rounded stochastically:
    those bits are a function of (seed, number of the update, position of the element)."""
    parameters = weights.parameters
    state = _state(config, parameters[0].dtype)
    if state in ("torch", "plain"):
        return torch.optim.AdamW(
            parameters,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
    return sodfast_kernels.AdamW(
        [{"params": parameters, "positions": weights.positions}],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        state=state,
        # The teacher's average rounds by the bare seed; shared bits would correlate the two.
        seed=draw_key(seed, Stream.ROUNDING),
    )


def alignment(config: OptimizerConfig, dtype: torch.dtype) -> int:
    """Elements that the state of weights of `dtype` cannot part: see `sodfast.parallel.fsdp`."""
    return BLOCK if _state(config, dtype) == "8bit" else GROUP


def _state(config: OptimizerConfig, dtype: torch.dtype) -> str:
    if config.adamw != "auto":
        return config.adamw
    return "8bit" if dtype == torch.bfloat16 else "torch"


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Linear warm-up over the first `warmup_steps` steps (1, 2, …), constant afterwards;
    `factor` times that in the steps of `lr_burst`."""
    lr = config.lr * min(1.0, step / config.warmup_steps) if config.warmup_steps else config.lr
    burst = config.lr_burst
    return lr * burst.factor if burst and burst.first <= step <= burst.last else lr


def update(
    optimizer: torch.optim.Optimizer,
    lr: float,
    clip_norm: float,
    loss: Tensor,
    norm: Tensor | None = None,
) -> float:
    """Clip the accumulated gradients to a global norm and step; returns the norm before clipping.

    `norm`: that norm, where the optimizer's parameters are a part of the model only. Raises
    `RunFailed` when loss or gradient is not finite, before any parameter has moved.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        if parameter.grad is None:  # no rollout of this update carried a gradient
            parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if isinstance(optimizer, sodfast_kernels.AdamW):
        norm = _fused_step(optimizer, clip_norm, loss, norm)
    else:
        if norm is None:
            norm = torch.nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters])
        _require_finite(loss, norm)
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def _fused_step(
    optimizer: sodfast_kernels.AdamW, clip_norm: float, loss: Tensor, norm: Tensor | None
) -> Tensor:
    """One pass measures the norm, clips and steps. Where the norm is not finite only the count of
    steps goes on, and is taken back."""
    _require_finite(loss)
    norm = optimizer.step(clip_norm=clip_norm, norm=norm)
    if not torch.isfinite(norm):
        for state in optimizer.state.values():
            state["step"] -= 1
    _require_finite(loss, norm)
    return norm


def _require_finite(loss: Tensor, norm: Tensor | None = None) -> None:
    found = {"loss": loss} if norm is None else {"loss": loss, "gradient norm": norm}
    if not torch.stack([torch.isfinite(value) for value in found.values()]).all():
        numbers = ", ".join(f"{name} {float(value)}" for name, value in found.items())
        raise RunFailed(f"{numbers}: the update was not made")
