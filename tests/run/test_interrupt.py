"""A signal becomes an exception: at once, after a shielded block, or where all ranks agree."""

import os
import signal

import pytest

from sodfast.errors import Interrupted
from sodfast.run.interrupt import Interruption

NUMBERS = [signal.SIGINT, signal.SIGTERM]


def test_interrupted_is_not_an_exception_that_libraries_swallow() -> None:
    assert not issubclass(Interrupted, Exception)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_raised_at_once_and_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    reached = []
    with pytest.raises(Interrupted), Interruption():
        os.kill(os.getpid(), number)
        reached.append("the line after")
    assert not reached
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", NUMBERS)
def test_a_shielded_block_is_finished_first(number: int) -> None:
    done = []
    with Interruption() as interruption:
        with pytest.raises(Interrupted), interruption.shielded():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # an impatient user
            done.append("the whole block")
        with interruption.shielded():  # the signal was answered and does not come again
            done.append("another block")
    assert done == ["the whole block", "another block"]


def test_an_error_in_a_shielded_block_is_not_hidden_by_a_signal() -> None:
    with (
        Interruption() as interruption,
        pytest.raises(ValueError, match="disk"),
        interruption.shielded(),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("disk")


def test_after_a_shielded_block_signals_are_raised_at_once_again() -> None:
    with Interruption() as interruption, pytest.raises(Interrupted):
        with interruption.shielded():
            pass
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")


def test_a_boundary_is_nothing_to_a_single_process() -> None:
    with Interruption() as interruption:
        interruption.boundary()


def test_ranks_stop_at_a_boundary_and_nowhere_else() -> None:
    """`agree` hears whether this rank has a signal, and its answer alone decides."""
    asked: list[bool] = []

    def agree(own: bool) -> bool:
        asked.append(own)
        return own

    with Interruption(agree) as interruption:
        interruption.boundary()
        os.kill(os.getpid(), signal.SIGTERM)
        with interruption.shielded():
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            interruption.boundary()
        interruption.boundary()
    assert asked == [False, True, False]


def test_another_ranks_signal_stops_this_one() -> None:
    with Interruption(lambda own: True) as interruption, pytest.raises(Interrupted):
        interruption.boundary()


def test_a_signal_that_the_others_have_not_agreed_to_waits() -> None:
    answers = iter([False, True])
    with Interruption(lambda own: own and next(answers)) as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        interruption.boundary()
        with pytest.raises(Interrupted):
            interruption.boundary()
