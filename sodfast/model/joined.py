"""Weights of linear layers that read the same input, laid out as one matrix.

A decoder layer multiplies one input by its query, key and value weights and another by its gate and
up weights. Where these lie one after the other in memory they are one matrix, and decoding does one
product in place of three or two. They stay parameters of their own: training, the optimizer, the
teacher and checkpoints see each as a contiguous tensor of its own shape, which happens to share its
storage with its neighbours. What writes to a parameter in place writes to the matrix, so the two
can never differ.

What gives a parameter other memory (a deep copy, a cast, FSDP's gathering) parts it from its
neighbours. Nothing breaks then: `joined` says so, and decoding multiplies by each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@torch.no_grad()
def join_weights(network: Any, device: torch.device) -> None:
    """Lay out the weights, and the biases, of each group on `device`; the rest stays where it is.

    One group at a time is in memory twice.
    """
    for module in network.modules():
        for names in GROUPS:
            linears: list[Any] = [getattr(module, name, None) for name in names]
            if all(type(linear) is nn.Linear for linear in linears):
                _join([linear.weight for linear in linears], device)
                if all(linear.bias is not None for linear in linears):
                    _join([linear.bias for linear in linears], device)


def joined(parameters: Sequence[Tensor]) -> Tensor | None:
    """The parameters as one tensor, a view of their memory along the first dimension; None where
    they do not lie one after the other in one storage."""
    first = parameters[0]
    place, storage = first.storage_offset(), first.untyped_storage()._cdata
    for parameter in parameters:
        alike = parameter.dtype == first.dtype and parameter.shape[1:] == first.shape[1:]
        if not alike or not parameter.is_contiguous() or parameter.storage_offset() != place:
            return None
        if parameter.untyped_storage()._cdata != storage:
            return None
        place += parameter.numel()
    shape = (sum(map(len, parameters)), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride())


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same memory, nothing copied, with a storage of its own for each tensor.

    For transformers' `save_pretrained`, which clones tensors that share a storage: those of the
    layers' joined weights would be in memory twice while they are written.
    """
    return {name: torch.from_dlpack(tensor.detach()) for name, tensor in tensors.items()}


def _join(parameters: Sequence[nn.Parameter], device: torch.device) -> None:
    first = parameters[0]
    if any(p.dtype != first.dtype or p.shape[1:] != first.shape[1:] for p in parameters):
        return
    rows = [len(parameter) for parameter in parameters]
    whole = first.new_empty(sum(rows), *first.shape[1:], device=device)
    for parameter, part in zip(parameters, whole.split(rows), strict=True):
        part.copy_(parameter)
        parameter.data = part
