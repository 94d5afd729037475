"""What one AdamW update is told of one parameter, whichever path makes it."""

from typing import Any, NamedTuple

from torch import Tensor


class Coefficients(NamedTuple):
    """The scalars of one step, computed on the host so that every backend rounds them alike."""

    mean_rate: float
    square_decay: float
    square_rate: float
    root_scale: float
    eps: float
    decay: float
    step_size: float


def coefficients(group: dict[str, Any], step: int) -> Coefficients:
    """Of the step with this number, the first being 1, under a parameter group's settings."""
    beta1, beta2 = group["betas"]
    return Coefficients(
        mean_rate=1.0 - beta1,
        square_decay=beta2,
        square_rate=1.0 - beta2,
        root_scale=(1.0 - beta2**step) ** -0.5,
        eps=group["eps"],
        decay=1.0 - group["lr"] * group["weight_decay"],
        step_size=group["lr"] / (1.0 - beta1**step),
    )


class Item(NamedTuple):
    """One parameter with a gradient, as an update needs it: flat, contiguous, on one device."""

    weight_P: Tensor
    grad_P: Tensor
    state: dict[str, Tensor]
    offset: int  # of its first element in the sequence of all parameters
    group: int  # index of its parameter group
    kind: str  # of that group's state
