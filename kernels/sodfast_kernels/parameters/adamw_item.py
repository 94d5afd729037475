"""What one AdamW update is told of one parameter, whichever path makes it."""

from typing import NamedTuple

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


class Item(NamedTuple):
    """One parameter with a gradient, as an update needs it: flat, contiguous, on one device."""

    weight_P: Tensor
    grad_P: Tensor
    state: dict[str, Tensor]
    offset: int  # of its first element in the sequence of all parameters
    coefficients: Coefficients
    step: int
    kind: str
    seed: int
