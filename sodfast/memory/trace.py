"""The phases on tensors without memory: what they allocate beside what is known to be there.

The trainer's own functions run on torch's fake tensors, which have a shape and a dtype and no
bytes, while `LiveBytes` adds up the storages that exist. So the activations of any architecture,
its checkpoints and every temporary come out as they are in a run, without weights, GPU or network.

The tensors are fake CPU tensors whatever the device: attention then keeps what FlashAttention keeps
(queries, keys, values, output and one number a head and token). Two things are invisible here: an
operation's own workspace, which is small and given back, and what the fused objective allocates,
which its own `linear_scratch_bytes` states.

Shapes: T tokens, N response tokens, H hidden size, H' that of the teacher's rows, V vocabulary.
"""

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from sodfast_kernels import linear_scratch_bytes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from sodfast.config import ObjectiveConfig
from sodfast.memory.network import FAKE
from sodfast.model.language_model import (
    decoder_layers,
    output_head,
    trained_parameters,
)
from sodfast.model.packing import response_hidden
from sodfast.objective import micro_batch_loss
from sodfast.rollout.cache import Cache
from sodfast.rollout.decoder import Decoder
from sodfast.rollout.engine import Sample

# The layers of most networks repeat after a few. A deeper network is measured with these multiples
# of that few, and the line through the two peaks gives its own.
DEPTHS = (2, 3)

Sequences = tuple[tuple[int, int], ...]  # tokens of (prompt or context, response) of a micro-batch
Peaks = tuple[int, ...]  # of a phase's parts, bytes
Pack = tuple[tuple[int, int], ...]  # tokens of each prompt of a prefill, and its samples


class LiveBytes(TorchDispatchMode):
    """Adds up the storages made under this mode that still exist.

    `known`: tensors that were there before and are not counted. `extra`: by operator, a function of
    its arguments that says how many bytes it takes beside its results while it runs.
    """

    def __init__(
        self, known: Iterable[Tensor], extra: dict[Any, Callable[..., int]] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._extra = extra or {}
        self._live = self._peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def take_peak(self) -> int:
        """The most bytes there were at once since the last call."""
        peak, self._peak = self._peak, self._live
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # two thirds of all calls
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return False  # the phases read values only to ask whether any is wrong
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        if func in self._extra:
            self._peak = max(self._peak, self._live + self._extra[func](*args))
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._live += storage.nbytes()
            self._peak = max(self._peak, self._live)
            weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self._live -= self._sizes.pop(key)


@cache
def peak(
    network: Any,
    phase: Callable[..., Peaks],
    *arguments: Hashable,
    whole: bool = False,
    last: int = 0,
) -> int:
    """The most bytes there are at once in `phase(network, *arguments)`, one of the functions
    below; measured once for the same arguments.

    The peak of each of the phase's parts is continued linearly from two depths, unless the network
    is shallow, its layers do not repeat, or all of it is to be measured (`whole`). The `last`
    layers, which are set up otherwise, are there at every depth.
    """
    repeated = len(decoder_layers(network)) - last
    shallow = None if whole else depths(network, last)
    with FAKE, _no_kernels():
        if shallow is None:
            return max(phase(network, *arguments))
        measured = []
        for depth in shallow:
            with _fewer_layers(network, depth, last):
                measured.append(phase(network, *arguments))
    less, more = shallow
    return max(
        high + (high - low) * (repeated - more) // (more - less)
        for low, high in zip(*measured, strict=True)
    )


def depths(network: Any, last: int = 0) -> tuple[int, int] | None:
    """Two depths at which the network's layers but the `last` repeat; None where it is hardly
    deeper."""
    layers = decoder_layers(network)
    kinds = getattr(network.config, "layer_types", None) or [None] * len(layers)
    shapes = [
        (kind, *(p.shape for p in layer.parameters()))
        for kind, layer in zip(kinds, layers, strict=True)
    ][: len(layers) - last]
    for period in range(1, len(shapes) // (DEPTHS[1] + 1) + 1):
        if all(shape == shapes[i % period] for i, shape in enumerate(shapes)):
            return DEPTHS[0] * period, DEPTHS[1] * period
    return None


# ---------------------------------------------------------------- the phases


def training(
    network: Any,
    objective: ObjectiveConfig,
    sequences: Sequences,
    teacher_width: int,
    accumulating: bool,
    on_gpu: bool,
) -> Peaks:
    """Forward, loss and backward pass of one micro-batch: the peak until the backward pass has left
    the last layer, and the peak after that.

    `teacher_width` [H']: of the teacher's hidden states and head, which are not counted.
    `accumulating`: gradients are there from an earlier micro-batch and not counted; otherwise they
    come into being, and are, so that the peak need not grow linearly with the depth.
    """
    softcap = getattr(network.config, "final_logit_softcapping", None)
    head, trained = output_head(network), trained_parameters(network).values()
    contexts, samples = _samples(sequences)
    teacher_hidden = [head.new_empty(n, teacher_width) for _, n in sequences]
    teacher_head = head.new_empty(len(head), teacher_width)
    gradients = [torch.empty_like(parameter) for parameter in trained if accumulating]
    for parameter, gradient in zip(trained, gradients, strict=False):  # of none or of all
        parameter.grad = gradient
    known = [*_tensors(network), *teacher_hidden, teacher_head, *gradients]

    def scratch(*arguments: Any) -> int:
        sides, backend = arguments[:4], "triton" if on_gpu else "torch"
        return linear_scratch_bytes(*sides, softcap=softcap, top_k=objective.top_k, backend=backend)

    peaks = []

    def watch(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments[0].requires_grad:
            arguments[0].register_hook(lambda _: peaks.append(live.take_peak()))

    hook = decoder_layers(network)[-1].register_forward_pre_hook(watch)
    with LiveBytes(known, {torch.ops.sodfast_kernels.evaluate.default: scratch}) as live:
        output = micro_batch_loss(
            objective,
            1.0,
            softcap,
            response_hidden(network, contexts, [sample.response for sample in samples]),
            head,
            teacher_hidden,
            teacher_head,
            samples,
            [(1.0, 1.0, 1.0)] * len(samples),
        )
        output.loss.backward()
    hook.remove()
    for parameter in trained:
        parameter.grad = None
    return (*peaks, live.take_peak())


def scoring(network: Any, sequences: Sequences) -> Peaks:
    """A forward pass over one micro-batch of (context, response) lengths, its result included."""
    contexts, samples = _samples(sequences)
    with torch.no_grad(), LiveBytes(_tensors(network)) as live:
        response_hidden(network, contexts, [sample.response for sample in samples])
    return (live.take_peak(),)


def prefill(
    network: Any, pack: Pack, page: int | None, pages: int, width: int, on_gpu: bool
) -> Peaks:
    """The native engine's prefill of one pack of prompts, and the logits behind it.

    `page`, `pages` and `width` (positions of the longest sequence): of its cache, whose own keys
    and values are not counted. So what a prompt writes is what it writes in a run: on a GPU once
    for all of its samples, but for the last, partial page of each.
    """
    lengths, samples = zip(*pack, strict=True)
    ends = accumulate(samples)
    rows = [range(end - count, end) for end, count in zip(ends, samples, strict=True)]
    total = sum(samples)
    cache = Cache(Decoder(network, width), total, width, None, page, pages)
    for length, sharing in zip(lengths, rows, strict=True):
        cache.start(sharing, length)
    with torch.no_grad(), LiveBytes([*_tensors(network), cache.memory]) as live:
        decoder = Decoder(network, width)
        ids_T = torch.zeros(sum(lengths), dtype=torch.int64)
        attend = cache.prefilling(lengths, rows)
        hidden_TH = decoder.forward(ids_T, ids_T, attend)
        if on_gpu:  # where 16-bit heads are multiplied without a copy in fp32
            hidden_TH.new_empty(total, len(decoder.head), dtype=torch.float32)
        else:
            decoder.logits(hidden_TH[:1].expand(total, -1))
    return (live.take_peak(),)


def _samples(sequences: Sequences) -> tuple[list[Tensor], list[Sample]]:
    """Contexts and samples of these lengths."""
    ids = [[torch.zeros(n, dtype=torch.int64) for n in lengths] for lengths in sequences]
    samples = [
        Sample(prompt, response, torch.zeros(len(response)), torch.zeros(len(response)), False)
        for prompt, response in ids
    ]
    return [prompt for prompt, _ in ids], samples


@contextmanager
def _fewer_layers(network: Any, first: int, last: int) -> Iterator[None]:
    """The network with its first and its last layers alone."""
    body = network.base_model
    ((name, layers),) = (m for m in body.named_children() if isinstance(m[1], nn.ModuleList))
    setattr(body, name, nn.ModuleList([*layers[:first], *layers[len(layers) - last :]]))
    try:
        yield
    finally:
        setattr(body, name, layers)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


@contextmanager
def _no_kernels() -> Iterator[None]:
    """Triton's kernels are not launched: they write where their callers have made room, and here
    there is nothing to write to."""
    if find_spec("triton") is None:
        yield
        return
    from triton.runtime import KernelInterface

    launch = KernelInterface.__getitem__
    KernelInterface.__getitem__ = lambda kernel, grid: lambda *args, **kwargs: None
    try:
        yield
    finally:
        KernelInterface.__getitem__ = launch
