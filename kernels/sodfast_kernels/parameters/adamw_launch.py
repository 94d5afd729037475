"""Triton: what the launches of AdamW need to know, found out once and kept from step to step.

Where weights and moments lie stays in tables on the device. What is new in each step goes there in
one copy: where the gradients are, and the scalars, which the host computes so that they are those
of the PyTorch path. Kernels read all of it from memory, so a CUDA graph that has captured a step
makes the next one when the copy was made before its replay.
"""

from collections.abc import Sequence
from struct import pack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adamw_item import Item, coefficients
from .adamw_kernels import SCALARS, STATE, STREAMED_STATE, adamw_kernel, squares_kernel
from .items import DTYPES, Table, alike, as_int64, is_vector, write


class Launch(NamedTuple):
    table: Table
    members: list[int]  # the items it works on, by their indices
    group: int  # index of the parameter group that they are all of


class Kind(NamedTuple):
    """What the items of an update's launch have in common."""

    group: int
    quantized: bool
    remainder: bool
    weight: torch.dtype
    grad: torch.dtype
    vector: bool


def _kind(item: Item) -> Kind:
    streamed = [value.data_ptr() for name, value in item.state.items() if name in STREAMED_STATE]
    weight, grad = item.weight_P, item.grad_P
    return Kind(
        item.group,
        item.kind == "8bit",
        "remainder" in item.state,
        weight.dtype,
        grad.dtype,
        is_vector(weight.numel(), weight.data_ptr(), grad.data_ptr(), *streamed),
    )


def _gradient_kind(item: Item) -> tuple[torch.dtype, bool]:
    return item.grad_P.dtype, is_vector(item.grad_P.numel(), item.grad_P.data_ptr())


def _squares_launch(items: Sequence[Item], members: list[int]) -> Launch:
    dtype, vector = _gradient_kind(items[members[0]])
    grads = [items[index].grad_P for index in members]
    constants = {"GRAD": DTYPES[dtype], "VECTOR": vector}
    table = Table([grad_P.numel() for grad_P in grads], grads[0].device, {}, constants)
    return Launch(table, members, items[members[0]].group)


def _update_launch(items: Sequence[Item], members: list[int]) -> Launch:
    group = [items[index] for index in members]
    kind = _kind(group[0])
    rows = {
        "offset": [item.offset for item in group],
        "weight": [item.weight_P.data_ptr() for item in group],
    }
    for name, entry in STATE.items():
        rows[name] = [item.state[entry].data_ptr() if entry in item.state else 0 for item in group]
    constants = {
        "WEIGHT": DTYPES[kind.weight],
        "GRAD": DTYPES[kind.grad],
        "QUANTIZED": kind.quantized,
        "REMAINDER": kind.remainder,
        "VECTOR": kind.vector,
    }
    numels = [item.weight_P.numel() for item in group]
    return Launch(Table(numels, group[0].weight_P.device, rows, constants), members, kind.group)


class Launches:
    """The launches of a step over `items`.

    They serve every later step whose `key` is the same: the caller's, of all that the items were
    made of, but for the addresses of the gradients. The items' counts of steps become views of one
    tensor, `steps`, so that all of them are counted at once.
    """

    def __init__(self, items: Sequence[Item], addresses: Tensor) -> None:
        self.key: object = None
        self.steps = torch.stack([item.state["step"] for item in items])
        for item, step in zip(items, self.steps.unbind(), strict=True):
            item.state["step"] = step
        self._lags = self._behind()
        self._alignment = addresses % 16
        self._captured: Tensor | None = None  # addresses of the gradients in a CUDA graph
        indices = range(len(items))
        kinds = list(zip(self._lags.tolist(), map(_kind, items), strict=True))
        self._squares = [
            _squares_launch(items, members)
            for members in alike(indices, lambda index: _gradient_kind(items[index]))
        ]
        self._updates = [
            _update_launch(items, members) for members in alike(indices, kinds.__getitem__)
        ]
        self._place(items[0].weight_P.device)

    def _place(self, device: torch.device) -> None:
        """Give what changes from step to step its place in one tensor: rows of the gradients'
        addresses, then the scalars of each update."""
        launches = [*self._squares, *self._updates]
        sizes = [launch.table.columns for launch in launches] + [SCALARS] * len(self._updates)
        self._moving = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        rows = self._moving.split(sizes)
        for launch, row in zip(launches, rows, strict=False):
            launch.table.arguments["grad_table"] = row
        for launch, row in zip(self._updates, rows[len(launches) :], strict=True):
            launch.table.arguments["scalars"] = row
        # Which of the addresses stands where in the rows; the last is 0.
        padding = len(self.steps)
        self._order = torch.tensor(
            [
                index
                for launch in launches
                for index in launch.members
                + [padding] * (launch.table.columns - len(launch.members))
            ]
        )

    def serve(self, key: object, addresses: Tensor) -> bool:
        """Whether these launches make a step over what `key` tells, gradients at `addresses`."""
        return (
            key == self.key
            and torch.equal(self._alignment, addresses % 16)
            and torch.equal(self._lags, self._behind())
        )

    def _behind(self) -> Tensor:
        """How many steps each item is behind the first one."""
        return self.steps[0] - self.steps

    def count(self, groups: Sequence[dict[str, Any]], addresses: Tensor) -> None:
        """Count a step, and write to the device what is new in it."""
        self.steps += 1
        scalars = bytearray()
        for launch in self._updates:
            group, step = groups[launch.group], int(self.steps[launch.members[0]])
            key = as_int64(group["seed"]), as_int64(step)
            scalars += pack(f"7d2q{8 * (SCALARS - 9)}x", *coefficients(group, step), *key)
        numbers = torch.frombuffer(scalars, dtype=torch.int64)
        write(self._moving, torch.cat([addresses[self._order], numbers]))

    def capture(self, addresses: Tensor) -> None:
        """A CUDA graph is about to record these launches, for gradients at these addresses."""
        if self._captured is not None and not torch.equal(self._captured, addresses):
            raise RuntimeError("another CUDA graph holds this step, with gradients elsewhere")
        self._captured = addresses

    def captured_with(self, addresses: Tensor) -> bool:
        return self._captured is not None and torch.equal(self._captured, addresses)

    def gradient_squares(self) -> Tensor:
        """Σ g² over all items, in fp64."""
        sums = []
        for launch in self._squares:
            squares = launch.table.partial_sums()
            launch.table.launch(squares_kernel, squares_ptr=squares)
            sums.append(squares.sum())
        return torch.stack(sums).sum()

    def apply(self, factor: Tensor) -> None:
        """Update every item; factor: as for adamw.TorchUpdate."""
        for launch in self._updates:
            launch.table.launch(adamw_kernel, factor_ptr=factor)
