"""Liger's Triton kernels for RMSNorm, RoPE and the gated MLP of one network.

Liger patches in two ways at once. On the instance it binds a forward to each norm and MLP, which is
what is wanted here: copies of the network take it along. In transformers' module of that
architecture it replaces the classes and `apply_rotary_pos_emb`, and so changes every other network
of the process, now or later; that is undone here. RoPE has no instance to patch, since attention
reads the function from its module, so this network's attention gets a forward that reads Liger's.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from inspect import signature
from types import FunctionType, MethodType
from typing import Any, Literal

import torch

from sodfast.errors import UsageError

_ROPE = "apply_rotary_pos_emb"


def use_liger(
    network: Any, wanted: bool | Literal["auto"], message: Callable[[str], object]
) -> None:
    """Patch `network` with Liger's kernels where `wanted`, the key `model.liger`, asks for them.

    `message` is called with one line when they are on and, under "auto" on a GPU, when they are
    not, with the reason. Raises `UsageError` when `wanted` is True and they are not possible.
    """
    if wanted is False:
        return
    reason = unsupported(network, network.device)
    if reason is None:
        patch(network)
        message("model.liger: Liger's kernels for RMSNorm, RoPE and the gated MLP")
    elif wanted is True:
        raise UsageError(f"model.liger=true is not possible: {reason}; use auto or false")
    elif network.device.type == "cuda":
        message(f"model.liger: false (slower), since {reason}")


def patch(network: Any) -> None:
    """Let `network`, and no other, compute with Liger's kernels."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[network.config.model_type]
    # Liger's losses stay off: sodfast_kernels computes the objective, and nothing asks the network
    # for a loss.
    losses = {"cross_entropy", "fused_linear_cross_entropy"} & signature(apply).parameters.keys()
    names = vars(sys.modules[type(network).__module__])
    before = dict(names)
    try:
        apply(model=network, **dict.fromkeys(losses, False))
        rope = names.get(_ROPE)  # transformers' own where Liger has not replaced it
    finally:
        names.update(before)
    for module in network.modules():
        forward = type(module).forward
        if _reads_rope(forward, names):
            module.forward = MethodType(_with_globals(forward, **{_ROPE: rope}), module)


def unsupported(network: Any, device: torch.device) -> str | None:
    """Why Liger cannot run this network on `device`; None where it can."""
    if device.type != "cuda":
        return f"Liger's kernels need a GPU, not {device}"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed: pip install 'sodfast[gpu]'"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = network.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"Liger does not know models of type {kind}"
    return None


def _reads_rope(forward: Any, names: dict[str, Any]) -> bool:
    """Whether this is a plain function, defined in the module whose globals are `names`, that calls
    that module's RoPE."""
    return (
        isinstance(forward, FunctionType)
        and forward.__globals__ is names
        and _ROPE in forward.__code__.co_names
    )


def _with_globals(function: FunctionType, **changes: Any) -> FunctionType:
    """A copy of `function` that finds `changes` among its module's globals."""
    changed = FunctionType(
        function.__code__,
        function.__globals__ | changes,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    changed.__kwdefaults__ = function.__kwdefaults__
    return changed
