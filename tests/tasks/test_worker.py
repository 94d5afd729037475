"""Workers that answer, hang, crash or flood, and that none of them is left."""

import os
import sys
import threading
import time

import pytest

from sodfast.tasks.worker import Worker, WorkerEnded, cores, parallel

ECHO = "import sys\nfor line in sys.stdin: print(line.strip(), flush=True)"


def worker(program: str) -> Worker:
    return Worker([sys.executable, "-c", program], {})


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_each_line_is_answered() -> None:
    echo = worker(ECHO)
    for request in ({"a": 1}, "é\n", ["x" * 200_000], None):
        assert echo.ask(request, 20) == request
    pid = echo._process.pid
    echo.close()
    assert is_gone(pid)


def test_one_that_hangs_is_killed() -> None:
    sleeper = worker("import time; time.sleep(60)")
    start = time.monotonic()
    with pytest.raises(WorkerEnded):
        sleeper.ask(1, 0.2)
    assert time.monotonic() - start < 10 and is_gone(sleeper._process.pid)


def test_one_that_ends_says_why() -> None:
    broken = worker("raise ValueError('no reply')")
    with pytest.raises(WorkerEnded, match="ValueError: no reply"):
        broken.ask(1, 20)
    assert is_gone(broken._process.pid)


def test_calls_run_side_by_side_and_keep_their_order() -> None:
    assert parallel(lambda x, y: x - y, [5, 4, 3], [1, 1, 1]) == [4, 3, 2]
    all_there = threading.Barrier(cores())
    parallel(lambda _: all_there.wait(20), range(cores()))
    with pytest.raises(ZeroDivisionError):
        parallel(lambda x: 1 / x, [1, 0, 1])
