"""The phases on tensors without memory: what they allocate beside what is known to be there.

The trainer's own functions run on torch's fake tensors, which have a shape and a dtype and no
bytes, while `LiveBytes` adds up the storages that exist. So the activations of any architecture,
its checkpoints and every temporary come out as they are in a run, without weights, GPU or network.

The tensors are fake CPU tensors whatever the device: attention then keeps what FlashAttention keeps
(queries, keys, values, output and one number a head and token). Two things are invisible in here:
what an operation takes for itself and gives back (a kernel's workspace), which is small, and what
the fused objective does, which its own `linear_scratch_bytes` states.

Shapes: T tokens, N response tokens, H hidden size, V vocabulary.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from sodfast_kernels import linear_scratch_bytes
from sodfast_kernels.parameters import (
    Item,
    coefficients,
    empty_state,
    update_chunk,
    update_flat,
)
from sodfast_kernels.philox import CHUNK
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sodfast import liger, lora
from sodfast.config import LoRAConfig, ObjectiveConfig
from sodfast.decoder import Cache, Decoder
from sodfast.errors import UsageError
from sodfast.model import decoder_layers, output_head, recompute_layers, trained_parameters
from sodfast.objective import micro_batch_loss
from sodfast.packing import can_pack, response_hidden, use_packed_attention
from sodfast.rollout import Sample

# A network that is deeper is measured at these multiples of the period in which its layers repeat,
# and continued linearly.
DEPTHS = (2, 3)


class LiveBytes(TorchDispatchMode):
    """Adds up the storages made under this mode that still exist.

    `known`: tensors that were there before. `extra`: what an operation takes beside its results.
    """

    def __init__(
        self, known: Iterable[Tensor], extra: dict[Any, Callable[..., int]] | None = None
    ) -> None:
        super().__init__()
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


class Rehearsal:
    """A network of `architecture` (the contents of a config.json), without weights.

    `liger`: with Liger's kernels where they are installed and know it; else without, which takes
    more. Raises `UsageError` for one that transformers does not know or that cannot be trained
    here.
    """

    def __init__(
        self,
        architecture: dict[str, Any],
        dtype: torch.dtype,
        recompute: bool,
        liger: bool,
        adapters: LoRAConfig | None = None,
    ) -> None:
        self.architecture, self.dtype = architecture, dtype
        self.recompute, self.liger, self.adapters = recompute, liger, adapters
        # Lengths and ids are real tensors, which keeps the functions' way through them known.
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.network = self._build()
        self.depths = _depths(self.network)
        self._cut: dict[int, Any] = {}
        self._measured: dict[tuple[Any, ...], int] = {}

    def _build(self) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        try:
            config = AutoConfig.for_model(**self.architecture)
            with self.mode, no_init_weights():
                network = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
            network.tie_weights()
        except (ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"model.path: its config.json makes no model: {reason}") from error
        if not can_pack(network):
            raise UsageError(
                f"model.path: sequences of a {type(network).__name__} cannot be packed: choose "
                "another model"
            )
        use_packed_attention(network)
        if self.adapters is not None:
            lora.require_peft()
            lora.inject_adapters(network, self.adapters, seed=0)
            self._forget_values(network)
        if self.liger and liger.unsupported(network, torch.device("cuda")) is None:
            liger.patch(network)
        if self.recompute:
            recompute_layers(network)
        return network.eval()

    def _forget_values(self, network: nn.Module) -> None:
        """peft cannot make adapters without memory: those it has made become fake here."""
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not isinstance(parameter, FakeTensor):
                    fake = self.mode.from_tensor(parameter.detach())
                    module.register_parameter(name, nn.Parameter(fake, parameter.requires_grad))

    def training(
        self,
        objective: ObjectiveConfig,
        softcap: float | None,
        sequences: Sequence[tuple[int, int]],
        teacher_width: int,
        accumulating: bool,
        on_gpu: bool,
    ) -> int:
        """Peak of forward, loss and backward pass of one micro-batch of (prompt, response) lengths.

        `teacher_width` [H']: of the teacher's hidden states and head, which are not counted.
        `accumulating`: gradients are there from an earlier micro-batch and not counted; otherwise
        they come into being, and are.
        """
        responses = [response for _, response in sequences]

        backend = "triton" if on_gpu else "torch"

        def extra(*arguments: Any) -> int:
            sides = arguments[:4]
            return linear_scratch_bytes(
                *sides, softcap=softcap, top_k=objective.top_k, backend=backend
            )

        def phase(network: Any) -> tuple[int, ...]:
            head = output_head(network)
            teacher_hidden = [head.new_empty(response, teacher_width) for response in responses]
            teacher_head = head.new_empty(len(head), teacher_width)
            known = [*network.parameters(), *network.buffers(), *teacher_hidden, teacher_head]
            trained = trained_parameters(network).values()
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter) if accumulating else None
                if accumulating:
                    known.append(parameter.grad)
            contexts, samples = self._samples(sequences)
            peaks = []

            def last_layer_is_through(_: Tensor) -> None:
                peaks.append(live.take_peak())

            def watch(_: nn.Module, arguments: tuple[Any, ...]) -> None:
                if arguments[0].requires_grad:
                    arguments[0].register_hook(last_layer_is_through)

            hook = decoder_layers(network)[-1].register_forward_pre_hook(watch)
            with LiveBytes(known, {torch.ops.sodfast_kernels.evaluate.default: extra}) as live:
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

        key = ("training", objective, softcap, tuple(sequences), teacher_width, accumulating)
        # While gradients come into being the peak need not grow linearly with the depth.
        return self._measure((*key, on_gpu), phase, whole=not accumulating)

    def scoring(self, sequences: Sequence[tuple[int, int]]) -> int:
        """Peak of scoring one micro-batch of (context, response) lengths, its result included."""

        def phase(network: Any) -> tuple[int, ...]:
            contexts, samples = self._samples(sequences)
            with torch.no_grad(), LiveBytes([*network.parameters(), *network.buffers()]) as live:
                response_hidden(network, contexts, [sample.response for sample in samples])
            return (live.take_peak(),)

        return self._measure(("scoring", tuple(sequences)), phase)

    def prefill(self, prompts: Sequence[int], copies: int, width: int, on_gpu: bool) -> int:
        """Peak of the native engine's prefill of prompts of these lengths, each for `copies`
        samples, and of the logits behind it. `width`: positions of a slot; its cache is not
        counted."""

        def phase(network: Any) -> tuple[int, ...]:
            parameters = list(network.parameters())
            decoder = Decoder(network, width)
            slots = len(prompts) * copies
            cache = Cache(decoder, slots, width)
            rows = [range(i * copies, (i + 1) * copies) for i in range(len(prompts))]
            tokens = sum(prompts)
            with (
                torch.no_grad(),
                LiveBytes([*parameters, *network.buffers(), cache.memory]) as live,
            ):
                decoder = Decoder(network, width)
                ids_T = torch.zeros(tokens, dtype=torch.int64)
                attend = cache.prefilling(prompts, rows)
                hidden_TH = decoder.forward(ids_T, ids_T, attend)
                if on_gpu:  # where 16-bit heads are multiplied without a copy in fp32
                    hidden_TH.new_empty(slots, len(decoder.head), dtype=torch.float32)
                else:
                    decoder.logits(hidden_TH[:1].expand(slots, -1))
            return (live.take_peak(),)

        return self._measure(("prefill", tuple(prompts), copies, width, on_gpu), phase)

    def updating(self, state: str) -> int:
        """Peak of what the PyTorch path of `sodfast_kernels.AdamW` takes beside its state."""
        parameter = self._largest()
        with self.mode:
            weight_P, stored = parameter.view(-1), empty_state(parameter, state)
            grad_P, factor = torch.empty_like(weight_P), torch.ones(())
            group = {"betas": (0.9, 0.999), "lr": 0.0, "eps": 0.0, "weight_decay": 0.0}
            item = Item(weight_P, grad_P, stored, 0, coefficients(group, 1), 1, state, 0)
            with LiveBytes([weight_P, grad_P, factor, *stored.values()]) as live:
                update_chunk(item, 0, factor)
        return live.take_peak()

    def following(self, rate: float) -> int:
        """Peak of what the PyTorch path of `sodfast_kernels.ParameterUpdate` takes."""
        with self.mode:
            student_P = self._largest().flatten()[:CHUNK]
            teacher_P = torch.empty_like(student_P)
            with LiveBytes([student_P, teacher_P]) as live:
                update_flat(teacher_P, student_P, 0, rate, 0, 0)
        return live.take_peak()

    def _largest(self) -> Tensor:
        return max(trained_parameters(self.network).values(), key=Tensor.numel).detach()

    def _samples(self, sequences: Sequence[tuple[int, int]]) -> tuple[list[Tensor], list[Sample]]:
        ids = [[torch.zeros(n, dtype=torch.int64) for n in lengths] for lengths in sequences]
        samples = [
            Sample(prompt, response, torch.zeros(len(response)), torch.zeros(len(response)), False)
            for prompt, response in ids
        ]
        return [prompt for prompt, _ in ids], samples

    def _measure(
        self,
        key: tuple[Any, ...],
        phase: Callable[[Any], tuple[int, ...]],
        whole: bool = False,
    ) -> int:
        """The peak of a phase, remembered under `key`, which says all that it depends on.

        `phase` gives the peaks of its parts. Each is continued linearly from two depths, unless the
        network is shallow, its layers do not repeat, or it is to be measured as a `whole`.
        """
        if key not in self._measured:
            depths = None if whole else self.depths
            networks = [self._shallow(depth) for depth in depths] if depths else [self.network]
            with self.mode, _no_kernels():
                peaks = [phase(network) for network in networks]
            parts = list(peaks[-1])
            if depths:
                less, more = depths
                beyond = len(decoder_layers(self.network)) - more
                pairs = zip(*peaks, strict=True)
                parts = [high + (high - low) * beyond // (more - less) for low, high in pairs]
            self._measured[key] = max(parts)
        return self._measured[key]

    def _shallow(self, depth: int) -> Any:
        if depth not in self._cut:
            network = self._build()
            (layers,) = (m for m in network.base_model.children() if isinstance(m, nn.ModuleList))
            del layers[depth:]
            network.config.num_hidden_layers = depth
            self._cut[depth] = network
        return self._cut[depth]


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


def _depths(network: Any) -> tuple[int, int] | None:
    """Two depths at which the network's layers repeat; None where it is hardly deeper."""
    layers = decoder_layers(network)
    kinds = getattr(network.config, "layer_types", None) or [None] * len(layers)
    shapes = [
        (kind, tuple(p.shape for p in layer.parameters()))
        for kind, layer in zip(kinds, layers, strict=True)
    ]
    for period in range(1, len(layers) // (DEPTHS[1] + 1) + 1):
        if all(shape == shapes[i % period] for i, shape in enumerate(shapes)):
            return DEPTHS[0] * period, DEPTHS[1] * period
    return None
