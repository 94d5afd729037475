"""What a launch depends on besides values: where its tensors lie, whether a graph records it."""

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

_SHAPE, _DTYPE, _DEVICE = attrgetter("shape"), attrgetter("dtype"), attrgetter("device")


class Layout(NamedTuple):
    """What is asked of tensors before their addresses are used; an entry for each of them.

    What was made for one layout, such as a table of pointers, serves all tensors of an equal one,
    be they the same objects or not: it is a function of these values. A layout keeps no tensor
    alive, so memory that was freed and given out again is in a layout only through its new owner.
    """

    addresses: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    strides: tuple[tuple[int, ...] | None, ...]  # None for a contiguous tensor
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[torch.device, ...]


def layout(tensors: Sequence[Tensor]) -> Layout:
    """Asked of hundreds of tensors at every call, so each question is one pass in C."""
    return Layout(
        tuple(map(Tensor.data_ptr, tensors)),
        tuple(map(_SHAPE, tensors)),
        tuple([None if tensor.is_contiguous() else tensor.stride() for tensor in tensors]),
        tuple(map(_DTYPE, tensors)),
        tuple(map(_DEVICE, tensors)),
    )


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes part of a CUDA graph instead of running."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
