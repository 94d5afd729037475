"""Where the student's weights are: with one process all on its device, with several a part on each.

Several ranks shard the student, its gradients and the optimizer's state with FSDP2 (`fully_shard`):
each parameter is cut along its first dimension into as many chunks as there are ranks. Training
gathers the weights layer by layer and adds up the gradients over the ranks; whatever needs no
gradients (rollouts, evaluation, the teacher's scores) reads them whole. With N ranks and P bytes of
weights, a rank holds

    always       P/N weights, P/N for a teacher of its own, P/N gradients, moments/N
    training     + embedding and head, two layers, the gradients of both
    otherwise    + P, given back at the end of the phase, and P/N while another teacher scores

so the whole model must fit beside the key-value cache on each device, as it does with one.

A chunk begins at a multiple of 8 elements or, with 8-bit moments, at a multiple of their blocks of
256. A parameter whose chunks would begin elsewhere (mostly norm weights) is whole on every rank and
updated alike on each. The random bits of stochastic rounding are keyed by an element's position in
the whole parameters, so rounding, moments and checkpoints are those of one process, whatever the
number of ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from sodfast_kernels import ParameterUpdate
from sodfast_kernels.parameters import BLOCK
from sodfast_kernels.philox import rng_offsets
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sodfast.model.language_model import decoder_layers, output_head, trained_parameters
from sodfast.model.packing import response_hidden
from sodfast.parallel.ranks import Ranks


class Weights:
    """A network's weights where one process has them all; with several, `ShardedWeights`.

    `parameters` are what an optimizer steps, in the order of the network's; `positions` where they
    begin in the stream of random bits (None: one after the other).
    """

    def __init__(self, network: nn.Module) -> None:
        self.network: Any = network
        trained = trained_parameters(network)
        self.names, self.parameters = list(trained), list(trained.values())
        self.positions: list[int] | None = None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A context in which the network's parameters are whole and can be read, for forwards
        without gradients. (Do not call the network's `state_dict` in it: FSDP then puts the chunks
        back.)"""
        yield

    def gradient_norm(self) -> Tensor | None:
        """Set the gradient of each of `parameters` and return the norm of all ranks' gradients;
        None with one process, where the norm over `parameters` is that norm."""
        return None

    @torch.no_grad()
    def finite(self) -> bool:
        """Whether the norm of `parameters` is finite. Several ranks may get different answers."""
        return bool(_norm(self.parameters).isfinite())

    def idle_pass(self) -> None:
        """A forward and a backward pass that add nothing, while other ranks make one that does."""

    def state_dict(self) -> dict[str, Tensor]:
        """The network's state dict of whole tensors, for the ranks that `gather_full` gives it."""
        return self.network.state_dict()

    def loadable(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A whole state dict as the network's `load_state_dict` takes it."""
        return tensors

    def gather_full(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put the ranks' parts, named NAME or NAME.MOMENT, together to whole tensors. With several
        ranks, rank 0 gets them, on the CPU, and the others get an empty dict."""
        return parts

    def shard(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts of whole tensors, named as for `gather_full`."""
        return tensors


@dataclass(frozen=True)
class Chunk:
    """How a parameter is cut: rank r has those of the elements r·size … (r+1)·size − 1 that exist.
    size 0: the parameter is not cut, and every rank has the whole."""

    shape: torch.Size
    size: int

    @classmethod
    def of(cls, parameter: Tensor, ranks: int, alignment: int) -> "Chunk":
        if parameter.dim() == 0 or parameter.numel() == 0:
            return cls(parameter.shape, 0)
        rows = -(-len(parameter) // ranks)
        size = rows * (parameter.numel() // len(parameter))
        return cls(parameter.shape, 0 if size % alignment else size)

    def piece(self, total: int) -> int:
        """How many elements a full chunk has of a tensor of `total` elements that belongs to the
        parameter and holds one for each of its elements, or one for each block of 8-bit moments."""
        return self.size if total == self.shape.numel() else self.size // BLOCK

    def shard(self, whole: Tensor, rank: int) -> Tensor:
        """Rank `rank`'s part of such a tensor."""
        if not self.size or whole.dim() == 0:
            return whole
        piece = self.piece(whole.numel())
        part = whole.flatten()[rank * piece : (rank + 1) * piece]
        row = whole[0].numel()
        return part.view(len(part) // row, *whole.shape[1:])


class ShardedWeights(Weights):
    """This rank's chunks of a network, which FSDP2 shards in place.

    `parameters` share their memory with the network's sharded ones. `alignment`: of the chunks, in
    elements (see the module).
    """

    def __init__(self, network: Any, ranks: Ranks, alignment: int) -> None:
        super().__init__(network)
        self.ranks = ranks
        self.chunks = [Chunk.of(p, ranks.size, alignment) for p in self.parameters]
        self.of_name = dict(zip(self.names, self.chunks, strict=True))
        begins, _ = rng_offsets(p.numel() for p in self.parameters)
        self.positions = [
            begin + ranks.rank * chunk.size
            for begin, chunk in zip(begins, self.chunks, strict=True)
        ]
        self.layers: list[Any] = list(decoder_layers(network))
        self.root = self._shard()
        with torch.no_grad():
            self.root()  # the first module that runs is FSDP's root for good
        self.root.reshard()
        self._registered = list(network.parameters())
        self.parameters = [
            nn.Parameter(part) if isinstance(p, DTensor) else p
            for p, part in zip(self._registered, _parts(network), strict=True)
        ]

    def _shard(self) -> Any:
        whole = {
            parameter
            for parameter, chunk in zip(self.parameters, self.chunks, strict=True)
            if not chunk.size
        }
        root: Any = _Root(self.network)
        mesh = init_device_mesh(output_head(self.network).device.type, (self.ranks.size,))
        for module in (*self.layers, root):
            sharded = fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=module is not root,
                # Weights are gathered as they are; 16-bit gradients are added up in fp32.
                mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
                ignored_params=whole,
            )
            # A sequence's weight is its share of the whole update: gradients are added up, not
            # averaged. gloo can only sum: it cannot scale by a factor on the way, not even by 1.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        # The order of gathering ahead is set here, since FSDP would take it from earlier forwards,
        # and the ranks need not have made the same ones without gradients.
        for module, following in pairwise([root, *self.layers]):
            following.set_modules_to_backward_prefetch([module])
            if module is not root:
                module.set_modules_to_forward_prefetch([following])
        # Embedding, last norm and head belong to the root, whose own forward never runs: they are
        # gathered before the body's first layer and stay until the gradients are added up, so that
        # the objective can multiply by the head.
        self.network.base_model.register_forward_pre_hook(lambda *_: root.unshard())
        return root

    @contextmanager
    def whole(self) -> Iterator[None]:
        modules = [module for module in self.root.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(module is not self.root, recurse=False)

    def gradient_norm(self) -> Tensor:
        sharded: list[Tensor] = []
        uncut: list[Tensor] = []
        for own, registered in zip(self.parameters, self._registered, strict=True):
            gradient = registered.grad
            if isinstance(gradient, DTensor):
                own.grad, registered.grad = gradient.to_local(), None
                sharded.append(own.grad)
            elif gradient is not None:
                uncut.append(gradient)
        self._add_up(uncut)
        return self.total(_norm(sharded), _norm(uncut))

    def _add_up(self, gradients: Sequence[Tensor]) -> None:
        """Σ over the ranks of what FSDP leaves alone, in place and in one message."""
        if gradients:
            flat_P = torch.cat([gradient.flatten().float() for gradient in gradients])
            parts = self.ranks.sum(flat_P).split([gradient.numel() for gradient in gradients])
            for gradient, part_P in zip(gradients, parts, strict=True):
                gradient.copy_(part_P.view(gradient.shape))

    def total(self, sharded: Tensor, uncut: Tensor) -> Tensor:
        """The norm of everything (fp32 scalar), given the norm of this rank's chunks and the norm
        of what is whole on every rank."""
        device = output_head(self.network).device
        square = self.ranks.sum(sharded.to(device, torch.float64).square())
        return (square + uncut.to(device, torch.float64).square()).sqrt().float()

    def idle_pass(self) -> None:
        # Every parameter must get a gradient: ranks that lacked some would send other messages.
        token = torch.tensor([0])
        hidden_NH = response_hidden(self.network, [token], [token])
        (0.0 * (hidden_NH @ output_head(self.network).T).sum()).backward()

    def state_dict(self) -> dict[str, Tensor]:
        # Without the second name of a tied parameter, as checkpoints are.
        parameters = {n for n, _ in self.network.named_parameters(remove_duplicate=False)}
        buffers = {n: t for n, t in self.network.state_dict().items() if n not in parameters}
        return buffers | self.gather_full(dict(zip(self.names, _parts(self.network), strict=True)))

    def loadable(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        sharded = dict(zip(self.names, self._registered, strict=True))
        return {
            name: DTensor.from_local(
                self._chunk(name).shard(tensor, self.ranks.rank).to(own.device),
                own.device_mesh,
                own.placements,
                run_check=False,
                shape=own.shape,
                stride=own.stride(),
            )
            if isinstance(own := sharded.get(name), DTensor)
            else tensor
            for name, tensor in tensors.items()
        }

    def gather_full(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        # A rank without any rows of a parameter may have no moments of it either.
        listed = {key: (part.dtype, part.numel()) for key, part in parts.items()}
        full = {}
        for key, (dtype, piece) in self.ranks.gather(listed)[0].items():
            chunk = self._chunk(key)
            part = parts.get(key)
            if chunk.size and (part is None or part.dim()):
                device = output_head(self.network).device
                part = torch.empty(0, dtype=dtype) if part is None else part
                part = self._gather(part.detach().to(device), chunk, piece)
            if self.ranks.main:
                assert part is not None
                full[key] = part.detach().cpu().contiguous()
        return full

    def _gather(self, part: Tensor, chunk: Chunk, piece: int) -> Tensor:
        """The whole of a tensor, of which this rank has `part` and rank 0 has `piece` elements."""
        sent = torch.zeros(piece, dtype=part.dtype, device=part.device)
        sent[: part.numel()] = part.flatten()
        sent = sent.view(torch.uint8)  # not every backend knows every dtype
        received = [torch.empty_like(sent) for _ in range(self.ranks.size)]
        dist.all_gather(received, sent)
        # Only the last chunks are short, so all the padding is at the end.
        full = torch.cat(received).view(part.dtype)
        numel = chunk.shape.numel()
        if piece == chunk.size:
            return full[:numel].view(chunk.shape)
        return full[: -(-numel // BLOCK)]

    def shard(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            key: self._chunk(key).shard(tensor, self.ranks.rank) for key, tensor in tensors.items()
        }

    def _chunk(self, key: str) -> Chunk:
        return self.of_name[key if key in self.of_name else key.rpartition(".")[0]]


class ShardedCopy:
    """A second set of chunks beside the student's, in device or host memory: a teacher's weights.

    They take the place of the student's while the teacher scores.
    """

    def __init__(self, weights: ShardedWeights, storage: Literal["device", "host"]) -> None:
        self.weights = weights
        on_host = storage == "host"
        device = output_head(weights.network).device
        self.chunks = {
            name: torch.empty_like(
                chunk,
                requires_grad=False,
                device="cpu" if on_host else device,
                pin_memory=on_host and device.type == "cuda",
            )
            for name, chunk in zip(weights.names, weights.parameters, strict=True)
        }
        self.copy_(weights.network)

    @torch.no_grad()
    def copy_(self, source: nn.Module) -> None:
        """φ ← θ: the chunks of `source`, the network that `weights` are of."""
        for own, student in zip(self.chunks.values(), _parts(source), strict=True):
            own.copy_(student)

    @contextmanager
    def on_device(self) -> Iterator[Any]:
        """The network with these weights; the student's own, kept as a second set of chunks on
        the device, are back at the end."""
        students = _parts(self.weights.network)
        kept = [student.clone() for student in students]
        for own, student in zip(self.chunks.values(), students, strict=True):
            student.copy_(own)
        try:
            yield self.weights.network
        finally:
            for student, value in zip(students, kept, strict=True):
                student.copy_(value)

    @torch.no_grad()
    def update_(self, source: nn.Module, rate: float, *, seed: int, step: int) -> Tensor:
        """φ ← φ + rate·(θ − φ); returns ‖θ − φ_before‖₂ over all ranks' chunks (fp32).

        `source` as for `copy_`. Rounded as one process would: see the module.
        """
        weights = self.weights
        sharded, uncut = (ParameterUpdate(rate, seed=seed, step=step) for _ in range(2))
        assert weights.positions is not None
        for own, student, chunk, position in zip(
            self.chunks.values(), _parts(source), weights.chunks, weights.positions, strict=True
        ):
            value = own.to(student.device)
            (sharded if chunk.size else uncut).add([value], [student], position)
            if value is not own:
                own.copy_(value)
        return weights.total(sharded.distance(), uncut.distance())


class _Root(nn.Module):
    """The module that FSDP treats as the model; FSDP changes its class instead of the network's."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self) -> None:
        """Nothing: training runs the network's body alone."""


def _parts(network: nn.Module) -> list[Tensor]:
    """What this rank has of each parameter, in the network's memory."""
    parameters = [parameter.detach() for parameter in network.parameters()]
    return [p.to_local() if isinstance(p, DTensor) else p for p in parameters]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """‖·‖₂ of all tensors together, fp32."""
    if not tensors:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))
