"""Decode steps as CUDA graphs, and reading on the host beside those that are queued.

All of it belongs to the thread's current GPU: see `current`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Within it a GPU is the one that streams, events and graphs are made on. The kernels' own
    `on_device` stands beside what imports triton, which not every machine has."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Graphs:
    """The graphs of one call, one for each number of rows and of tokens of a row, all in one pool
    of memory: none runs beside another, and what a step leaves lies outside of it."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.captured: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def run(self, size: tuple[int, int], step: Callable[[], None], state: Sequence[Tensor]) -> None:
        """Queue one `step` of this size, rows and tokens of each, captured when it is first asked
        for. `state`: the tensors that a step advances; what else it writes it may write twice."""
        if size not in self.captured:
            self.captured[size] = self._capture(step, state)
        self.captured[size].replay()

    def _capture(self, step: Callable[[], None], state: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        """The first step compiles, loads and allocates, which a graph cannot hold; it is undone."""
        before = [tensor.clone() for tensor in state]
        stream, main = _streams(torch.cuda.current_device()).capturing, torch.cuda.current_stream()
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            step()
        main.wait_stream(stream)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream):
            step()
        return graph


def mark(device: torch.device) -> Any:
    """An event behind what is queued on a GPU so far; None for other devices."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def beside(event: Any) -> AbstractContextManager[Any]:
    """Within it, what the host reads waits for what is in front of the event, and not for what was
    queued behind it."""
    if event is None:
        return nullcontext()
    stream = _streams(torch.cuda.current_device()).looking
    stream.wait_event(event)
    return torch.cuda.stream(stream)


class _Streams(NamedTuple):
    capturing: Any  # torch.cuda.Stream
    looking: Any


@cache
def _streams(gpu: int) -> _Streams:
    """The same ones for all calls of the process on a GPU: cuBLAS keeps a workspace of 32 MiB for
    each stream that it has run on."""
    return _Streams(torch.cuda.Stream(gpu), torch.cuda.Stream(gpu))
