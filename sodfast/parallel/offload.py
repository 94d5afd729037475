"""A model whose weights stay in host memory and pass through the device layer by layer.

Host memory holds one flat buffer per decoder layer and one per run of other parameters (embedding;
final norm and head), pinned where the device is a GPU, so that a layer is one transfer. On the
device a layer lives in one of `SLOTS` reused buffers while a forward pass needs it:

    copy stream      | layer 0 | layer 1 | layer 2 |      | layer 3 |     | layer 4 | …
    compute stream             |   0    |   1    |   2    |   3    | …
    slot                 0         1         2        0 (after layer 0's use)

`filled` events make the compute stream wait for a transfer, `free` events make the copy stream wait
for the end of a use; the host waits for neither. A transfer is hidden as long as computing a layer
takes longer than the transfer: at 50 GB/s and 500 TFLOP/s, with 16-bit weights, from 10,000 tokens
a micro-batch on. Without CUDA the same code runs without pinning, and the streams and events of
torch.cpu do nothing.

Bytes on the device, Qwen3-8B in bf16 (a layer 386 MB, embedding and head 1.24 GB each):
    scoring   SLOTS layers + embedding, norm and head = 3.6 GB instead of 16.4 GB
    training  the head, which the objective multiplies by the scores' hidden states
    update    SLOTS layers + the embedding or the head, when gradients are gone
On the host 16.4 GB, in the student's dtype; 23.6 GB where torch rounds pinned buffers up to powers
of two (see `pinned_setting`).
"""

import copy
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import cycle, groupby
from typing import Any

import torch
from sodfast_kernels import ParameterUpdate
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from sodfast.model.language_model import decoder_layers, output_head

SLOTS = 3  # the layer in use and two ahead of it
ALIGNMENT = 512  # bytes, as CUDA's allocator: kernels find addresses as aligned as elsewhere


def pinned_setting(version: str = torch.__version__) -> str:
    """What in PYTORCH_ALLOC_CONF keeps torch from rounding pinned buffers above 1 MiB up to powers
    of two; empty for a version that does not know it, which would refuse to start."""
    return "pinned_max_round_threshold_mb:1" if TorchVersion(version) >= "2.13" else ""


def pinned_bytes(size: int, version: str = torch.__version__) -> int:
    """Bytes of host memory that torch takes for a pinned buffer of `size` bytes."""
    return size if pinned_setting(version) and size > 2**20 else 1 << (size - 1).bit_length()


def blocks(network: Any) -> list[tuple[nn.Module | None, list[nn.Parameter]]]:
    """A network's parameters in order, those of a decoder layer together, and the runs between.

    Raises `UsageError` as `decoder_layers` does.
    """
    owner = {id(p): layer for layer in decoder_layers(network) for p in layer.parameters()}
    runs = groupby(network.parameters(), lambda parameter: owner.get(id(parameter)))
    return [(layer, list(run)) for layer, run in runs]


def block_bytes(parameters: Sequence[Tensor]) -> int:
    """Bytes of a block's memory."""
    return sum(_aligned(parameter.nbytes) for parameter in parameters)


@dataclass(frozen=True)
class Block:
    """Parameters that travel together: a decoder layer's, or some that belong to no layer.

    `memory` [bytes] uint8 on the host holds them one after the other, each ALIGNMENT bytes apart.
    """

    layer: nn.Module | None
    parameters: list[nn.Parameter]
    memory: Tensor

    def views(self, memory: Tensor) -> list[Tensor]:
        """The parameters as they lie in `memory` [≥ bytes] uint8, on whatever device."""
        return _views(memory, self.parameters)

    def point(self, memory: Tensor) -> None:
        """Let the network's parameters lie in `memory`."""
        for parameter, view in zip(self.parameters, self.views(memory), strict=True):
            parameter.data = view


class HostCopy:
    """A copy of `source`, on whose device it computes while its weights stay on the host.

    `network` is the copy: outside of `on_device` its parameters are host tensors to read, write
    and save like any others.
    """

    def __init__(self, source: nn.Module) -> None:
        self.device = output_head(source).device
        self._backend = torch.get_device_module(self.device)  # torch.cuda or torch.cpu
        pinned = self.device.type == "cuda"
        self._copies = self._backend.Stream(self.device) if pinned else self._backend.Stream()
        copies: dict[int, Any] = {}
        parts = []
        for layer, originals in blocks(source):
            memory = torch.empty(block_bytes(originals), dtype=torch.uint8, pin_memory=pinned)
            views = _views(memory, originals)
            parts.append((layer, [nn.Parameter(v, requires_grad=False) for v in views], memory))
            copies |= {id(p): c for p, c in zip(originals, parts[-1][1], strict=True)}
        # deepcopy takes what its memo holds as already copied, so the device holds no second copy.
        self.network: Any = copy.deepcopy(source, copies)
        self.blocks = [
            Block(None if layer is None else copies[id(layer)], parameters, memory)
            for layer, parameters, memory in parts
        ]
        self._layers = [block for block in self.blocks if block.layer is not None]
        self.copy_(source)

    @torch.no_grad()
    def copy_(self, source: nn.Module) -> None:
        """φ ← θ: the parameters of `source` into host memory, in place, layer by layer."""
        for parameter, original in zip(self.network.parameters(), source.parameters(), strict=True):
            parameter.copy_(original, non_blocking=True)
        self._backend.synchronize(self.device)

    @torch.no_grad()
    def update_(self, source: nn.Module, rate: float, *, seed: int, step: int) -> Tensor:
        """φ ← φ + rate·(θ − φ) on the device, block by block; returns ‖θ − φ_before‖₂ (fp32).

        Bit for bit `ema_update_` of a copy on the device (see `ParameterUpdate` for the distance
        on CUDA), stochastic rounding of 16-bit weights included. Results go back to the host on
        the compute stream, while the copy stream brings the next layers.
        """
        update = ParameterUpdate(rate, seed=seed, step=step)
        originals = source.parameters()
        with closing(self._staged(self._layers)) as layers:
            for block in self.blocks:
                memory = self._to_device(block) if block.layer is None else next(layers)[1]
                update.add(block.views(memory), [next(originals) for _ in block.parameters])
                if rate:
                    block.memory.copy_(memory[: block.memory.nbytes], non_blocking=True)
        self._backend.synchronize(self.device)
        return update.distance()

    @contextmanager
    def on_device(self) -> Iterator[Any]:
        """The network for forward passes on the device; under `torch.no_grad` only.

        Parameters outside the layers are there from the start to the end, a layer's while it runs.
        A tensor taken from the former, such as the head, stays valid afterwards.
        """
        with closing(self._staged(cycle(self._layers))) as staged:

            def take_weights(layer: nn.Module, _: Any) -> None:
                block, memory = next(staged)
                if block.layer is not layer:
                    raise RuntimeError("the decoder layers did not run in order, each once")
                block.point(memory)

            hooks = [
                block.layer.register_forward_pre_hook(take_weights)
                for block in self._layers
                if block.layer is not None
            ]
            try:
                for block in self.blocks:
                    if block.layer is None:
                        block.point(self._to_device(block))
                yield self.network
            finally:
                for hook in hooks:
                    hook.remove()
                for block in self.blocks:
                    block.point(block.memory)

    def _staged(self, blocks: Iterable[Block]) -> Generator[tuple[Block, Tensor], None, None]:
        """Each block with its bytes on the device, brought there ahead of time.

        The bytes are valid for the work that the current stream is given before the next block is
        asked for; after that the buffer may be filled again.
        """
        compute = self._backend.current_stream(self.device)
        size = max(block.memory.nbytes for block in self._layers)
        slots = [_Slot(size, self.device, self._backend, compute) for _ in range(SLOTS)]
        rest = iter(blocks)
        ahead: deque[tuple[Block, _Slot]] = deque()

        def bring(block: Block, slot: _Slot) -> None:
            self._copies.wait_event(slot.free)
            with self._backend.stream(self._copies):
                slot.memory[: block.memory.nbytes].copy_(block.memory, non_blocking=True)
            slot.filled.record(self._copies)
            ahead.append((block, slot))

        try:
            for slot, block in zip(slots, rest):  # noqa: B905  # fewer blocks than slots, or more
                bring(block, slot)
            while ahead:
                block, slot = ahead.popleft()
                compute.wait_event(slot.filled)
                yield block, slot.memory
                slot.free.record(compute)
                if (following := next(rest, None)) is not None:
                    bring(following, slot)
        finally:
            # The slots' memory returns to the compute stream: no transfer may still write to it.
            compute.wait_stream(self._copies)

    def _to_device(self, block: Block) -> Tensor:
        return block.memory.to(self.device, non_blocking=True, copy=True)


class _Slot:
    """A device buffer [size] uint8 and the two events that pass it between the streams."""

    def __init__(self, size: int, device: torch.device, backend: Any, compute: Any) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.filled, self.free = backend.Event(), backend.Event()
        # The first transfer waits for what the memory's previous owner has queued on this stream.
        self.free.record(compute)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _views(memory: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    views, start = [], 0
    for parameter in parameters:
        stop = start + parameter.nbytes
        views.append(memory[start:stop].view(parameter.dtype).view(parameter.shape))
        start += _aligned(parameter.nbytes)
    return views
