"""Counter-based streams: draws depend on their key alone; prompts come in whole epochs."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sodfast.rng import PromptOrder, Stream, generator


def first(seed: int, stream: Stream, *counters: int) -> list[int]:
    return generator(seed, stream, *counters).integers(0, 2**63, size=4).tolist()


def test_every_key_is_a_stream_of_its_own() -> None:
    keys = itertools.product((0, 1, 2**63 - 1), Stream, (0, 1, 2**40), (0, 1, 63), (0, 5))
    draws = [tuple(first(*key)) for key in keys]
    numbers = [number for draw in draws for number in draw]
    assert len(draws) == 3 * len(Stream) * 18
    assert len(set(numbers)) == len(numbers)


def test_a_draw_does_not_depend_on_other_draws() -> None:
    alone = first(7, Stream.ROLLOUT, 3, 2)
    neighbour = generator(7, Stream.ROLLOUT, 3, 1)
    neighbour.random(10_000)
    np.random.default_rng(7).random(10)
    assert first(7, Stream.ROLLOUT, 3, 2) == alone


def test_long_draws_of_neighbouring_counters_do_not_overlap() -> None:
    """The draw counter is a word of its own, so a long stream never runs into the next one."""
    numbers = [
        number
        for counters in ((1, 0), (2, 0), (1, 1), (2, 1))
        for number in generator(0, Stream.EVAL, *counters).integers(0, 2**63, 20_000).tolist()
    ]
    assert len(set(numbers)) == len(numbers)


def test_at_most_three_counters() -> None:
    first(0, Stream.EVAL, 1, 2, 3)
    with pytest.raises(ValueError, match="at most 3"):
        first(0, Stream.EVAL, 1, 2, 3, 4)


@given(st.integers(0, 2**63 - 1), st.integers(1, 40), st.integers(0, 3))
def test_every_epoch_is_a_permutation(seed: int, size: int, epoch: int) -> None:
    order = PromptOrder(seed, size).take(epoch * size, size)
    assert sorted(order) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    epochs = [PromptOrder(0, 50).take(50 * epoch, 50) for epoch in range(4)]
    epochs.append(PromptOrder(1, 50).take(0, 50))
    assert all(a != b for a, b in itertools.combinations(epochs, 2))


@given(
    st.integers(0, 99),
    st.integers(1, 12),
    st.integers(0, 50),
    st.lists(st.integers(0, 15), max_size=8),
)
def test_the_sequence_does_not_depend_on_the_cuts(
    seed: int, size: int, cursor: int, cuts: list[int]
) -> None:
    prompts = PromptOrder(seed, size)
    whole = PromptOrder(seed, size).take(cursor, sum(cuts))
    parts = []
    for count in cuts:
        parts += prompts.take(cursor + len(parts), count)
    assert parts == whole
    # Backwards as well: nothing is kept from call to call.
    if whole:
        assert prompts.take(cursor, 1) == whole[:1]


def test_a_step_larger_than_the_set_asks_every_question_again() -> None:
    order = PromptOrder(3, 5).take(0, 17)
    assert [sorted(order[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert len(set(order[15:])) == 2
    assert PromptOrder(3, 1).take(4, 3) == [0, 0, 0]
