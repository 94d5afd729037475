"""The calls of the peers fit the packages as installed, and compute what ours computes.

The packages are those of the extra `peers`, which `make test-peers` has, and flashinfer. A test is
skipped where its package is absent.
"""

from collections.abc import Callable
from typing import Any

import pytest
import suite_peers
import torch
from kernel_inputs import DEVICE
from sodfast_kernels import reference
from suite_peers import Call, Peer, Sides

PEERS = {peer.name: peer for peer in suite_peers.objective_peers(0.0)}
MODULE = {"TRL": "trl", "Liger": "liger_kernel", "fla": "fla"}


def sides() -> Sides:
    generator = torch.Generator().manual_seed(0)
    state, teacher = (torch.randn(6, 8, generator=generator) for _ in range(2))
    head, teacher_head = (torch.randn(11, 8, generator=generator) / 3 for _ in range(2))
    return Sides(state.requires_grad_(), head.requires_grad_(), teacher, teacher_head)


def bind(call: Call) -> dict[str, Any]:
    """What each parameter is given; a TypeError if the call does not fit."""
    return dict(call.signature.bind(*call.positional, **call.named).arguments)


def peer_of(name: str, alpha: float) -> Peer:
    pytest.importorskip(MODULE[name.partition(":")[0]], reason="the extra `peers` is absent")
    peers = {peer.name: peer for peer in suite_peers.objective_peers(alpha)}
    if name not in peers:
        pytest.skip("it has no such divergence")
    return peers[name]


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_objective_peers_take_what_they_are_given(name: str, alpha: float) -> None:
    peer = peer_of(name, alpha)
    given = sides()
    bound = bind(peer.call(given, alpha))
    # Whatever the order and the names: the student's tensors where gradients are made.
    roles = {
        "TRL": ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight"),
        "Liger": ("student_input", "student_weight", "teacher_input", "teacher_weight"),
        "fla": ("x", "weight", "target_x", "target_weight"),
    }[name.partition(":")[0]]
    for role, tensor in zip(roles, given, strict=True):
        assert bound[role] is tensor, role


def of_optimizer() -> Call:
    pytest.importorskip("torchao", reason="the extra `peers` is absent")
    return suite_peers.torchao_adamw([torch.zeros(256, requires_grad=True)])


def of_flashinfer(call: Callable[[torch.Tensor], Call]) -> Callable[[], Call]:
    def made() -> Call:
        pytest.importorskip("flashinfer", reason="flashinfer-python is absent")
        return call(torch.zeros(2, 5))

    return made


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (of_optimizer, {"lr": 1e-5, "bf16_stochastic_round": True}),
        (of_flashinfer(suite_peers.flashinfer), {"seed": 1, "offset": 0}),
        (of_flashinfer(suite_peers.flashinfer_top_p), {"top_p": 0.95, "seed": 1, "offset": 0}),
    ],
    ids=["torchao", "flashinfer", "flashinfer, top-p"],
)
def test_other_peers_take_what_they_are_given(make: Callable[[], Call], named: Any) -> None:
    bound = bind(make())
    assert {name: bound[name] for name in named} == named


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5])
def test_a_peer_computes_the_mean_divergence(name: str, alpha: float) -> None:
    """Else its time would be compared with that of something else. Their kernels, too, run in
    Triton's interpreter where there is no GPU."""
    peer = peer_of(name, alpha)
    given, ours = (Sides(*(tensor.detach().to(DEVICE) for tensor in sides())) for _ in range(2))
    for tensor in (*given[:2], *ours[:2]):
        tensor.requires_grad_()
    loss = peer.loss(peer.call(given, alpha)())
    expected = reference.linear_distillation_loss(*ours, alpha=alpha).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(given.state.grad, ours.state.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(given.head.grad, ours.head.grad, rtol=1e-4, atol=1e-6)


def test_a_call_that_does_not_fit_is_found() -> None:
    class Module(torch.nn.Module):
        def forward(self, hidden: Any, labels: Any) -> None: ...

    assert bind(suite_peers.of_module(Module(), 1, labels=2)) == {"hidden": 1, "labels": 2}
    with pytest.raises(TypeError, match="labels"):
        bind(suite_peers.of_module(Module(), 1))

    class Function:
        @staticmethod
        def forward(ctx: Any, hidden: Any, beta: float) -> None: ...

        @staticmethod
        def apply(*given: Any) -> None: ...

    assert bind(suite_peers.of_autograd(Function, 1, 2.0)) == {"hidden": 1, "beta": 2.0}
    with pytest.raises(TypeError, match="too many"):
        bind(suite_peers.of_autograd(Function, 1, 2.0, 3))
