"""The processes of one run, and what they tell each other apart from weights and gradients.

    torchrun --nproc-per-node N -m sodfast train …

starts N ranks of the same program. They share out what takes long, the rollouts and the passes of
training, and gather the results. Everything else each rank computes for itself from the same
numbers, so that rewards, statistics and the schedule's decisions are the same on all. What only one
rank can know, such as an error or a signal, it tells the others before any of them acts on it, so
that no rank waits for one that has left. Rank 0 alone writes the run directory and the output.

Without torchrun there is one rank, and nothing is sent.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sodfast.errors import RunFailed, UsageError

T = TypeVar("T")

# How long a rank waits for the slowest one, which may be busy with a rollout, an evaluation or a
# checkpoint. The limit is not there to find dead ranks, since torchrun notices those at once.
PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Ranks:
    """This process, number `rank` of `size`. All of them make the same calls in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes the run directory and the output."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of `items`, neighbours together; the parts in order are all of them."""
        bounds = [len(items) * rank // self.size for rank in (self.rank, self.rank + 1)]
        return items[bounds[0] : bounds[1]]

    def deal(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of `lengths` for each rank, dealt in turn from the longest on, so that the ranks
        get about equal numbers of about equal lengths. A single rank gets all, in order."""
        if self.size == 1:
            return [list(range(len(lengths)))]
        order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
        return [order[rank :: self.size] for rank in range(self.size)]

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, whatever can be pickled, in order of rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def sum(self, tensor: Tensor) -> Tensor:
        """Σ over the ranks, in place: the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error of one rank in this block becomes every rank's, after all have finished it.

        The block itself must not talk to other ranks. An exception that is neither `UsageError`
        nor `RunFailed` is a defect and ends its rank at once; torchrun then ends the others.
        """
        if self.size == 1:
            yield
            return
        own: UsageError | RunFailed | None = None
        try:
            yield
        except (UsageError, RunFailed) as error:
            own = error
        for found in self.gather(own):
            if found is not None:
                raise found


ALONE = Ranks()


@contextmanager
def join() -> Iterator[Ranks]:
    """The ranks that torchrun has started, until the block ends; one rank where it has not. Raises
    `UsageError` where the variables by which it says so are none of its own."""
    try:
        size = int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1
        if size != 1:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
    except ValueError as error:
        raise UsageError(
            f"this process cannot join the others of torchrun, which its variables name: {error}; "
            "start it by torchrun, or unset TORCHELASTIC_RUN_ID"
        ) from error
    if size == 1:
        yield ALONE
        return
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
