"""How graphs are captured and the host reads beside them, with stand-ins for CUDA's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sodfast.rollout import graphs
from sodfast.rollout.graphs import Graphs, beside, mark

CPU = torch.device("cpu")


class Stream:
    """Says in `log` what it waits for."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(("waits", self, other))

    def wait_event(self, event: Any) -> None:
        self.log.append(("waits", self, event))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Entries and exits of streams and captures; a graph that is replayed only says so."""
    entries: list[Any] = []
    main = Stream(entries)

    class Graph:
        def replay(self) -> None:
            entries.append(("replay", self))

    @contextmanager
    def stream(which: Stream) -> Iterator[None]:
        entries.append(("on", which))
        yield
        entries.append(("off", which))

    @contextmanager
    def capture(graph: Graph, pool: Any, stream: Stream) -> Iterator[None]:
        entries.append(("capture", graph, pool, stream))
        yield
        entries.append(("captured", graph))

    pools = iter(range(100))
    for name, value in {
        "Stream": lambda gpu: Stream(entries),
        "current_device": lambda: 0,
        "current_stream": lambda: main,
        "stream": stream,
        "graph": capture,
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: next(pools),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    graphs._streams.cache_clear()
    yield entries
    graphs._streams.cache_clear()


def test_a_step_is_captured_once_for_each_number_of_rows_and_its_warm_up_is_undone(
    log: list[Any],
) -> None:
    count, cached = torch.zeros(1), torch.full((1,), 5)
    seen: list[tuple[float, float]] = []

    def step() -> None:
        seen.append((float(count), float(cached)))
        count.add_(1)
        cached.add_(1)

    kept = Graphs()
    for rows in (4, 4, 2, 4):
        count.zero_()
        cached.fill_(5)
        kept.run(rows, step, [count, cached])
    # Twice for a warm-up and a capture of each, both from the state as it was.
    assert seen == [(0.0, 5.0)] * 4
    assert [entry[0] for entry in log].count("replay") == 4
    first, second = kept.captured.values()
    replayed = [entry[1] for entry in log if entry[0] == "replay"]
    assert replayed == [first, first, second, first]


def test_every_capture_takes_the_same_stream_and_a_calls_captures_the_same_pool(
    log: list[Any],
) -> None:
    for _ in range(2):
        kept = Graphs()
        for rows in (1, 2, 8):
            kept.run(rows, lambda: None, [])
    captures = [entry for entry in log if entry[0] == "capture"]
    assert [pool for *_, pool, _ in captures] == [0] * 3 + [1] * 3
    (stream,) = {stream for *_, stream in captures}
    assert stream is graphs._streams(0).capturing
    assert {entry[1] for entry in log if entry[0] == "on"} == {stream}  # the warm-ups, too


def test_a_look_waits_for_its_event_on_a_stream_of_its_own(log: list[Any]) -> None:
    event = object()
    with beside(event):
        log.append("read")
    looking = graphs._streams(0).looking
    assert log == [("waits", looking, event), ("on", looking), "read", ("off", looking)]
    assert looking is not graphs._streams(0).capturing


def test_another_gpu_has_streams_of_its_own(
    log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Graphs().run((1, 1), lambda: None, [])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    Graphs().run((1, 1), lambda: None, [])
    first, second = (stream for kind, *_, stream in log if kind == "capture")
    assert first is graphs._streams(0).capturing and second is graphs._streams(1).capturing


def test_without_a_gpu_there_is_nothing_to_wait_for(log: list[Any]) -> None:
    assert mark(CPU) is None
    with beside(None):
        pass
    assert log == []
