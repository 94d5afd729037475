"""How the peers are called: one function for each, so that a test can hold the calls against the
signatures of the installed packages (the extra `peers`; tests/bench/test_suite_peers.py).

Peers are imported where they are called, so nothing else needs them. One that is expected and
absent gets a row that says so, and misses its target.
"""

from collections.abc import Callable, Sequence
from inspect import Signature, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sides(NamedTuple):
    """hidden [N, H] and head [V, H] of student and teacher; the student's require gradients."""

    state: Tensor
    head: Tensor
    teacher: Tensor
    teacher_head: Tensor


class Call(NamedTuple):
    """function(*positional, **named), where `function` has the parameters of `signature`."""

    function: Callable[..., Any]
    positional: tuple[Any, ...]
    named: dict[str, Any]
    signature: Signature

    def __call__(self) -> Any:
        return self.function(*self.positional, **self.named)


def of_autograd(function: Any, *positional: Any) -> Call:
    """The call of an autograd function, whose `forward` takes a context before them."""
    own = signature(function.forward)
    parameters = list(own.parameters.values())[1:]
    return Call(function.apply, positional, {}, own.replace(parameters=parameters))


def of_module(module: torch.nn.Module, *positional: Any, **named: Any) -> Call:
    return Call(module, positional, named, signature(module.forward))


class Peer(NamedTuple):
    """name: of its row, and for `--without` the part before the colon.
    call: of (sides, alpha).
    loss: the mean divergence of the rows, from what the call returns.
    """

    name: str
    call: Callable[[Sides, float], Call]
    loss: Callable[[Any], Tensor] = lambda returned: returned


def trl(sides: Sides, alpha: float) -> Call:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    state, head, teacher, teacher_head = sides
    return of_autograd(
        ChunkedDivergenceFunction, state, head, None, teacher, teacher_head, None, alpha, 1.0
    )


def liger_fused(sides: Sides, alpha: float) -> Call:
    from liger_kernel.transformers import LigerFusedLinearJSD

    return of_module(LigerFusedLinearJSD(jsd_beta=alpha), *sides, shift_labels=None)


def liger_chunked(sides: Sides, alpha: float) -> Call:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    gpu = sides.state.device.type == "cuda"  # on a CPU its compilation takes longer than the test
    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=alpha, compiled=gpu
    )
    labels = torch.zeros(len(sides.state), dtype=torch.int64, device=sides.state.device)
    return of_module(module, *sides, true_labels=labels)


def fla(sides: Sides, alpha: float) -> Call:
    from fla.modules import FusedKLDivLoss

    assert alpha == 0, "fla has the forward KL alone"
    state, head, teacher, teacher_head = sides
    return of_module(FusedKLDivLoss(), state, teacher, head, teacher_head)


def objective_peers(alpha: float) -> list[Peer]:
    """Those that compute the divergence with this α from hidden states and heads."""
    peers = [
        Peer("TRL: chunked divergence", trl, lambda returned: returned[0].mean()),
        Peer("Liger: fused_linear_jsd", liger_fused),
        Peer("Liger: chunked_loss JSD", liger_chunked),
    ]
    return peers + ([Peer("fla: fused KL", fla)] if alpha == 0 else [])


def torchao_adamw(params: Sequence[Tensor]) -> Call:
    """What makes the optimizer."""
    from torchao.optim import AdamW8bit

    return Call(AdamW8bit, (params, 1e-5), {"bf16_stochastic_round": True}, signature(AdamW8bit))


def flashinfer(logits_BV: Tensor) -> Call:
    """A seed of its own, since a CUDA graph cannot read the generator's state."""
    from flashinfer.sampling import sampling_from_probs

    given, named = (logits_BV.float().softmax(-1),), {"seed": 1, "offset": 0}
    return Call(sampling_from_probs, given, named, signature(sampling_from_probs))


def flashinfer_top_p(logits_BV: Tensor) -> Call:
    """Temperature 0.6 and top-p 0.95."""
    from flashinfer.sampling import top_p_sampling_from_probs

    given, named = ((logits_BV.float() / 0.6).softmax(-1), 0.95), {"seed": 1, "offset": 0}
    return Call(top_p_sampling_from_probs, given, named, signature(top_p_sampling_from_probs))
