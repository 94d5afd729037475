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

Shapes: P elements of one flattened parameter.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..backend import uses_triton
from ..philox import CHUNK, GROUP, random_bits, rng_offsets, round_stochastic
from .adamw_item import Coefficients, Item
from .formats import BLOCK, M_TOP, V_TOP, decode, encode, join, split

STATES = ("8bit", "fp32", "exact")


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
        items: list[Item] = []
        following = 0
        for group in self.param_groups:
            params = group["params"]
            positions, following = rng_offsets([param.numel() for param in params], following)
            for param, position in zip(params, group["positions"] or positions, strict=True):
                if param.grad is not None and param.numel():
                    items.append(self._item(param, group, position))
        if not items:
            device = self.param_groups[0]["params"][0].device
            return torch.zeros((), device=device) if norm is None else norm
        devices = {item.weight_P.device for item in items}
        if len(devices) > 1:
            raise ValueError(f"params must be on one device, got {sorted(map(str, devices))}")
        squares, update = gradient_squares, update_adamw
        if uses_triton(self.backend, (item.weight_P for item in items)):
            from . import adamw_kernels

            squares, update = adamw_kernels.gradient_squares, adamw_kernels.update_adamw
        if norm is None:
            norm = squares([item.grad_P for item in items]).sqrt().to(torch.float32)
        # A NaN factor is the sign not to update at all.
        factor = torch.ones_like(norm).masked_fill(~norm.isfinite(), torch.nan)
        if clip_norm is not None:
            factor = factor * (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        update(items, factor)
        return norm

    def _item(self, param: Tensor, group: dict[str, Any], offset: int) -> Item:
        assert param.grad is not None
        if param.grad.is_sparse:
            raise ValueError("params: sparse gradients are not supported")
        if not param.is_contiguous():
            raise ValueError(f"params: a tensor of shape {tuple(param.shape)} is not contiguous")
        state = self.state[param]
        if not state:
            state.update(empty_state(param, group["state"]))
        state["step"] += 1
        step = int(state["step"].item())
        return Item(
            weight_P=param.detach().view(-1),
            grad_P=param.grad.reshape(-1),
            state=state,
            offset=offset,
            coefficients=coefficients(group, step),
            step=step,
            kind=group["state"],
            seed=group["seed"],
        )

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


def coefficients(group: dict[str, Any], step: int) -> Coefficients:
    beta1, beta2 = group["betas"]
    return Coefficients(
        mean_rate=1.0 - beta1,
        square_decay=beta2,
        square_rate=1.0 - beta2,
        root_scale=(1.0 - beta2**step) ** -0.5,
        eps=group["eps"],
        decay=1.0 - group["lr"] * group["weight_decay"],
        step_size=group["lr"] / (1.0 - beta1**step),
    )


def gradient_squares(grads: list[Tensor]) -> Tensor:
    """Σ g² over all tensors, in fp64."""
    squares = torch.zeros((), dtype=torch.float64, device=grads[0].device)
    for grad_P in grads:
        for chunk in torch.split(grad_P, CHUNK):
            squares += chunk.double().square().sum()
    return squares


def update_adamw(items: list[Item], factor: Tensor) -> None:
    """Update every item; factor: fp32 scalar that multiplies the gradients, NaN for no update."""
    if factor.isnan():
        return
    for item in items:
        for start in range(0, item.weight_P.numel(), CHUNK):
            update_chunk(item, start, factor)


def update_chunk(item: Item, start: int, factor: Tensor) -> None:
    """Update CHUNK elements from `start` on."""
    scalars = item.coefficients
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
            seed=item.seed,
            step=item.step,
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
