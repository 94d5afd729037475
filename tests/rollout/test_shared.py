"""Rollouts shared out among ranks, here threads of one process: who asks, and what all get."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from sodfast.errors import RunFailed
from sodfast.parallel.ranks import Ranks
from sodfast.rollout.engine import Sample, SampleKey, Sampling
from sodfast.rollout.shared import SharedEngine

SAMPLING, DRAWS = Sampling(1.0, 1.0, 4), SampleKey(5, 2)


class Board:
    """Where threads that stand for ranks lay down their values and wait for the others'."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    board: Board = field(default_factory=lambda: Board(1))

    def gather(self, value: Any) -> list[Any]:
        return self.board.gather(self.rank, value)


class Recorder:
    """An engine whose samples say which prompt and which number they are; as views of one large
    tensor, as a batch's rows are."""

    name = "recorder"

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.required: list[int] = []
        self.broken = False

    def require(self, tokens: int) -> None:
        self.required.append(tokens)

    def generate(
        self,
        prompts: Sequence[Tensor],
        samples: Sequence[int],
        sampling: Sampling,
        draws: SampleKey,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Sample]:
        assert (sampling, draws) == (SAMPLING, DRAWS)
        if self.broken:
            raise RunFailed("the model's logits are not finite")
        self.calls.append(list(samples))
        batch = torch.zeros(1000, 2)
        found = []
        for row, (prompt, number) in enumerate(zip(prompts, samples, strict=True)):
            batch[row] = torch.tensor([float(prompt[0]), float(number)])
            found.append(Sample(prompt, torch.tensor([number]), batch[row], batch[row], False))
            progress(row + 1, len(prompts))
        return found


def share(
    size: int, prompts: int, broken: int | None = None
) -> tuple[list[Any], list[Recorder], list[int]]:
    """What each rank gets for so many prompts (an error as itself), its engine, and how often the
    weights were made whole on it."""
    board, engines = Board(size), [Recorder() for _ in range(size)]
    results, gathered = [None] * size, [0] * size

    def run(rank: int) -> None:
        @contextmanager
        def whole_weights() -> Iterator[None]:
            gathered[rank] += 1
            yield

        engines[rank].broken = rank == broken
        shared = SharedEngine(engines[rank], ThreadRanks(rank, size, board), whole_weights)
        questions = [torch.tensor([10 * index]) for index in range(prompts)]
        numbers = range(100, 100 + prompts)
        try:
            results[rank] = shared.generate(questions, numbers, SAMPLING, DRAWS)  # type: ignore[call-overload]
        except RunFailed as error:
            results[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results, engines, gathered


@pytest.mark.parametrize(("size", "prompts"), [(1, 5), (2, 6), (2, 7), (3, 4)])
def test_each_rank_runs_its_share_and_all_get_all_in_order(size: int, prompts: int) -> None:
    results, engines, _ = share(size, prompts)
    assert [number for engine in engines for (call,) in [engine.calls] for number in call] == list(
        range(100, 100 + prompts)
    )
    for samples in results:
        assert [int(sample.prompt[0]) for sample in samples] == list(range(0, 10 * prompts, 10))
        assert [int(sample.response[0]) for sample in samples] == list(range(100, 100 + prompts))


def test_a_rank_without_prompts_asks_nothing_but_helps_with_the_weights() -> None:
    """Making the weights whole is a call that all ranks make together."""
    results, engines, gathered = share(3, 1)
    assert sorted(len(engine.calls) for engine in engines) == [0, 0, 1]
    assert gathered == [1, 1, 1]
    assert all(len(samples) == 1 for samples in results)


def test_an_error_on_one_rank_ends_the_call_on_all() -> None:
    results, _, _ = share(2, 4, broken=1)
    assert [str(result) for result in results] == ["the model's logits are not finite"] * 2


def test_samples_travel_without_the_batch_that_they_are_views_of() -> None:
    (samples,), _, _ = share(1, 3)
    for sample in samples:
        assert sample.logprob.untyped_storage().nbytes() == sample.logprob.nbytes
        assert sample.entropy.untyped_storage().nbytes() == sample.entropy.nbytes


def test_name_and_requirements_are_the_inner_engines() -> None:
    engine = Recorder()
    shared = SharedEngine(engine, Ranks(), None)  # type: ignore[arg-type]
    shared.require(37)
    assert shared.name == "recorder" and engine.required == [37]
