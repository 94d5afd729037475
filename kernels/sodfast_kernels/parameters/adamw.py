"""AdamW whose state fits beside bf16 weights: 8-bit moments, fp32 moments, or an exact fp32 master.

    g ← g · min(1, clip_norm / ‖g‖₂)                    (over all parameters, only with clip_norm)
    m ← m + (1 − β₁)(g − m)        v ← β₂v + (1 − β₂)g²
    p ← (1 − lr·λ)p − lr/(1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + ε)

(Loshchilov and Hutter, arXiv 1711.05101), in fp32, on values read from and written to

    state    weight                        moments    bytes a bf16 parameter, read and written
    "8bit"   rounded stochastically        8 bits     2 (gradient) + 4 (weight) + 4       = 10
    "fp32"   rounded stochastically        fp32       2 + 4 + 16                          = 22
    "exact"  with its 16-bit remainder     fp32       2 + 4 + 4 (remainder) + 16          = 26

and 2 more to read the gradient for its norm. The formats are in formats.py. An fp32 weight is its
own master: with it "exact" and "fp32" are the same, and only "8bit" rounds anything.

Weight and moments of an element share its 16 random bits: each rounding is unbiased, and the three
results are next used one step later, when the bits are fresh.

Every rounding is a function of (seed, step, position of the element). This file is the PyTorch
path; the Triton kernel gives the same bits.

Under a CUDA graph: `AdamW.advance`.

Shapes: P elements of one flattened parameter.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..backend import uses_triton
from ..philox import CHUNK, GROUP, random_bits, rng_offsets, round_stochastic
from .adamw_item import Item, coefficients
from .formats import BLOCK, M_TOP, V_TOP, decode, encode, join, split
from .layout import is_capturing

if TYPE_CHECKING:
    from .adamw_launch import Launches

STATES = ("8bit", "fp32", "exact")
# For passes over hundreds of tensors in every step.
_GRAD, _DTYPE = attrgetter("grad"), attrgetter("dtype")


class Work(NamedTuple):
    """Which parameters a step is of: those that have elements and a gradient."""

    sizes: list[int]  # numbers of elements of all parameters
    chosen: list[bool]  # which of all parameters these are
    params: list[Tensor]
    grads: list[Tensor]  # contiguous
    addresses: Tensor  # of the gradients, on the host, and a 0 for tables to pad with


class AdamW(torch.optim.Optimizer):
    """AdamW over fp32, bf16 or fp16 parameters with compact, exactly reproducible state.

    params, lr, betas, eps, weight_decay: as in torch.optim.AdamW.
    state: "8bit", "fp32" or "exact" (see the module); "exact" needs fp32 or bf16 parameters.
    seed: of the stochastic rounding; the same seed, parameters and gradients give the same bits.
    backend: "auto" (Triton on CUDA, PyTorch elsewhere), "triton" or "torch": the same bits.

    `state`, `seed` and the rest may differ between parameter groups. A group may also say where its
    parameters stand in the stream of random bits: `positions`, a multiple of GROUP for each; by
    default they are the `rng_offsets` of all parameters. Then a part of a parameter is rounded as
    it is in the whole, provided that it begins at a multiple of GROUP (with 8-bit moments: of
    BLOCK). Raises ValueError naming the argument that does not fit.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state: str = "8bit",
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "state": state,
            "seed": seed,
            "positions": None,
        }
        uses_triton(backend, ())  # refuses an unknown one now, not at the first step
        self.backend = backend
        self._launches: Launches | None = None  # of the last step, on the Triton path
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            if not group[name] >= 0.0:
                raise ValueError(f"{name} must be ≥ 0, got {group[name]}")
        if not all(0.0 <= beta < 1.0 for beta in group["betas"]):
            raise ValueError(f"betas must be in [0, 1), got {group['betas']}")
        if group["state"] not in STATES:
            raise ValueError(f"state must be one of {STATES}, got {group['state']!r}")
        allowed = {torch.float32, torch.bfloat16, torch.float16}
        if group["state"] == "exact":
            allowed.remove(torch.float16)
        for param in group["params"]:
            if param.dtype not in allowed:
                raise ValueError(f"params: {param.dtype} does not work with {group['state']!r}")
        positions = group["positions"]
        if positions is not None and (
            len(positions) != len(group["params"]) or any(p % GROUP for p in positions)
        ):
            raise ValueError(f"positions must be a multiple of {GROUP} for each of the params")

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        clip_norm: float | None = None,
        norm: Tensor | None = None,
    ) -> Tensor:
        """One update of every parameter that has a gradient.

        clip_norm: scale the gradients so that their global norm does not exceed it.
        norm: that norm, an fp32 scalar, where these parameters are only some of those it is of.
        Returns the norm before clipping, an fp32 scalar on the parameters' device. Where it is not
        finite, weights and moments stay as they were (only the count of steps goes on, because
        nothing is sent to the host to find out).
        """
        if closure is not None:
            raise ValueError("closure is not supported: compute the gradients before step()")
        if clip_norm is not None and not clip_norm > 0.0:
            raise ValueError(f"clip_norm must be > 0, got {clip_norm}")
        work = self._work()
        if not work.params:
            device = self.param_groups[0]["params"][0].device
            return torch.zeros((), device=device) if norm is None else norm
        capturing = is_capturing(work.params[0].device)
        update = self._captured(work) if capturing else self._counted(work)
        if norm is None:
            norm = update.gradient_squares().sqrt().to(torch.float32)
        # A NaN factor is the sign not to update at all: ∞ − ∞ is NaN.
        factor = norm - norm + 1.0
        if clip_norm is not None:
            factor = factor * (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        update.apply(factor)
        torch.autograd.graph.increment_version(work.params)
        return norm

    def advance(self) -> None:
        """Count a step before the replay of a CUDA graph that has captured `step`.

        What a captured step reads of its number (bias corrections, random bits) and of the groups'
        settings (lr and the others) lies on the device, where this writes the next step's:

            optimizer.step()                    # at least one step before, on the Triton path
            with torch.cuda.graph(graph):
                optimizer.step(clip_norm=1.0)   # recorded: it neither runs nor counts
            for _ in range(steps):
                ...                             # lr, and new values in the same gradients
                optimizer.advance()
                graph.replay()

        `clip_norm` and `norm` are part of the graph. Parameters, gradients and state stay where
        they were at the capture (`zero_grad(set_to_none=False)`); RuntimeError where they do not.
        """
        work = self._work()
        launches = self._serving(work)
        if launches is None or not launches.captured_with(work.addresses):
            raise RuntimeError(
                "no CUDA graph holds a step of these parameters, gradients and state: capture "
                "`step` again after any of them has changed its place"
            )
        launches.count(self.param_groups, work.addresses)

    def _work(self) -> Work:
        params = [param for group in self.param_groups for param in group["params"]]
        sizes = list(map(Tensor.numel, params))
        grads = list(map(_GRAD, params))
        chosen = [grad is not None and size > 0 for grad, size in zip(grads, sizes, strict=True)]
        if not all(chosen):
            params, grads = list(compress(params, chosen)), list(compress(grads, chosen))
        if not all(map(Tensor.is_contiguous, grads)):
            if any(grad.is_sparse for grad in grads):
                raise ValueError("params: sparse gradients are not supported")
            grads = [grad.contiguous() for grad in grads]
        addresses = array("q", [*map(Tensor.data_ptr, grads), 0])
        return Work(sizes, chosen, params, grads, torch.frombuffer(addresses, dtype=torch.int64))

    def _captured(self, work: Work) -> Launches:
        """The launches for a CUDA graph to record."""
        launches = self._serving(work)
        if launches is None:
            raise RuntimeError(
                "before a CUDA graph captures it, make the same step once, on the Triton path, "
                "with all parameters, gradients and state in place"
            )
        launches.capture(work.addresses)
        return launches

    def _counted(self, work: Work) -> Launches | TorchUpdate:
        """What makes the step, and the step counted."""
        launches = self._serving(work)
        if launches is None:
            items = self._items(work)
            if not uses_triton(self.backend, work.params):
                for item in items:
                    item.state["step"] += 1
                return TorchUpdate(items, self.param_groups)
            from .adamw_launch import Launches

            launches = self._launches = Launches(items, work.addresses)
            launches.key = self._key(work)
        launches.count(self.param_groups, work.addresses)
        return launches

    def _serving(self, work: Work) -> Launches | None:
        """The launches of the last step, where they are right for this one too."""
        launches = self._launches
        if launches is None or not launches.serve(self._key(work), work.addresses):
            return None
        return launches

    def _key(self, work: Work) -> tuple[object, ...]:
        """All that launches depend on, apart from values and the gradients' addresses.

        It names memory by its address and so keeps none alive, nor does it mistake what was freed
        for what has taken its place: launches fit any tensors of which all this is the same. An
        address says the device, too.
        """
        states: Iterable[dict[str, Tensor]] = self.state.values()
        if len(self.state) != len(work.params) or not all(map(is_, self.state, work.params)):
            states = map(self.state.__getitem__, work.params)  # the same, but hashing is slow
        groups = [
            (group["state"], len(group["params"]), group["positions"] and tuple(group["positions"]))
            for group in self.param_groups
        ]
        return (
            self.backend,
            groups,
            work.sizes,
            work.chosen,
            list(map(Tensor.data_ptr, work.params)),
            list(map(_DTYPE, work.params)),
            list(map(Tensor.is_contiguous, work.params)),
            list(map(Tensor.numel, work.grads)),
            list(map(_DTYPE, work.grads)),
            list(map(Tensor.data_ptr, chain.from_iterable(map(dict.values, states)))),
        )

    def _items(self, work: Work) -> list[Item]:
        """Checked, and with the state of those that are updated for the first time."""
        devices = {param.device for param in work.params}
        if len(devices) > 1:
            raise ValueError(f"params must be on one device, got {sorted(map(str, devices))}")
        grads = dict(zip(work.params, work.grads, strict=True))
        items = []
        following = 0
        for index, group in enumerate(self.param_groups):
            sizes = [param.numel() for param in group["params"]]
            positions, following = rng_offsets(sizes, following)
            positions = group["positions"] or positions
            for param, position in zip(group["params"], positions, strict=True):
                if param not in grads:
                    continue
                if not param.is_contiguous():
                    shape = tuple(param.shape)
                    raise ValueError(f"params: a tensor of shape {shape} is not contiguous")
                if grads[param].numel() != param.numel():  # `.data` of either has changed
                    raise ValueError(
                        f"params: a tensor of {param.numel()} elements has a gradient of "
                        f"{grads[param].numel()}"
                    )
                state = self.state[param]
                if not state:
                    state.update(empty_state(param, group["state"]))
                weight_P, grad_P = param.detach().view(-1), grads[param].view(-1)
                items.append(Item(weight_P, grad_P, state, position, index, group["state"]))
        return items

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore exactly: torch's own method would round the moments to the weights' dtype.

        Raises ValueError when a saved tensor does not fit the parameter it belongs to.
        """
        super().load_state_dict({**state_dict, "state": {}})
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        pairs = [
            (param, group["state"]) for group in self.param_groups for param in group["params"]
        ]
        for index, (param, kind) in zip(saved, pairs, strict=True):
            values = state_dict["state"].get(index)
            if values is None:
                continue
            state = empty_state(param, kind)
            if state.keys() != values.keys():
                raise ValueError(f"state_dict: entry {index} has {[*values]}, expected {[*state]}")
            for name, empty in state.items():
                value = values[name]
                if empty.shape != value.shape or empty.dtype != value.dtype:
                    raise ValueError(
                        f"state_dict: {name} of entry {index} is {value.dtype} "
                        f"{tuple(value.shape)}, expected {empty.dtype} {tuple(empty.shape)}"
                    )
                empty.copy_(value)
            self.state[param] = state


def empty_state(param: Tensor, kind: str) -> dict[str, Tensor]:
    """The state before the first step: every moment and remainder 0."""
    state = {"step": torch.zeros((), dtype=torch.int64)}
    for name in ("exp_avg", "exp_avg_sq"):
        if kind == "8bit":
            state[name] = torch.zeros(param.shape, dtype=torch.uint8, device=param.device)
            state[name + "_exponent"] = torch.zeros(
                -(-param.numel() // BLOCK), dtype=torch.uint8, device=param.device
            )
        else:
            state[name] = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
    if kind == "exact" and param.dtype == torch.bfloat16:
        state["remainder"] = torch.zeros(param.shape, dtype=torch.int16, device=param.device)
    return state


class TorchUpdate:
    """The PyTorch path of one step, whose number the items' states hold already."""

    def __init__(self, items: Sequence[Item], groups: Sequence[dict[str, Any]]) -> None:
        self.items, self.groups = items, groups

    def gradient_squares(self) -> Tensor:
        """Σ g² over all items, in fp64."""
        device = self.items[0].grad_P.device
        squares = torch.zeros((), dtype=torch.float64, device=device)
        for item in self.items:
            for chunk in torch.split(item.grad_P, CHUNK):
                squares += chunk.double().square().sum()
        return squares

    def apply(self, factor: Tensor) -> None:
        """Update every item; factor: fp32 scalar that multiplies the gradients, NaN for none."""
        if factor.isnan():
            return
        for item in self.items:
            for start in range(0, item.weight_P.numel(), CHUNK):
                update_chunk(item, self.groups[item.group], start, factor)


def update_chunk(item: Item, group: dict[str, Any], start: int, factor: Tensor) -> None:
    """Update CHUNK elements from `start` on."""
    step = int(item.state["step"])
    scalars = coefficients(group, step)
    weight_P = item.weight_P[start : start + CHUNK]
    part = slice(start, start + weight_P.numel())
    state = {name: value.view(-1) for name, value in item.state.items() if name != "step"}
    quantized = item.kind == "8bit"
    blocks = slice(start // BLOCK, -(-part.stop // BLOCK))
    if quantized:
        m_P = decode(state["exp_avg"][part], state["exp_avg_exponent"][blocks], M_TOP)
        v_P = decode(state["exp_avg_sq"][part], state["exp_avg_sq_exponent"][blocks], V_TOP)
    else:
        m_P, v_P = state["exp_avg"][part], state["exp_avg_sq"][part]
    master_P = weight_P.float()
    if "remainder" in state:
        master_P = join(weight_P, state["remainder"][part])

    g_P = item.grad_P[part].float() * factor
    m_P = m_P + (g_P - m_P) * scalars.mean_rate
    v_P = v_P * scalars.square_decay + (g_P * g_P) * scalars.square_rate
    # In fp64, because torch's fp32 root is not correctly rounded on every CPU.
    root_P = v_P.double().sqrt().float()
    update_P = m_P / (root_P * scalars.root_scale + scalars.eps)
    master_P = master_P * scalars.decay - update_P * scalars.step_size

    rounds_weight = weight_P.dtype.itemsize == 2 and "remainder" not in state
    if quantized or rounds_weight:
        bits_P = random_bits(
            g_P.numel(),
            seed=group["seed"],
            step=step,
            offset=item.offset + start,
            device=g_P.device,
        )
    if "remainder" in state:
        rounded_P, state["remainder"][part] = split(master_P)
        weight_P.copy_(rounded_P)
    elif rounds_weight:
        weight_P.copy_(round_stochastic(master_P, bits_P, weight_P.dtype))
    else:
        weight_P.copy_(master_P)
    if quantized:
        for name, value_P, top in (("exp_avg", m_P, M_TOP), ("exp_avg_sq", v_P, V_TOP)):
            codes_P, exponent_B = encode(value_P, bits_P, top)
            state[name][part], state[name + "_exponent"][blocks] = codes_P, exponent_B
    else:
        state["exp_avg"][part], state["exp_avg_sq"][part] = m_P, v_P
