"""Two ranks on this CPU, kept for a session: starting processes takes longer than their runs."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SIZE = 2


class Pair:
    """`pair(function, *arguments)` calls `function(ranks, *arguments)` on both ranks and returns
    both results. What one of them raises comes as an AssertionError with its traceback."""

    def __init__(self) -> None:
        context = get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pipes = []
        self._processes = []
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, port), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = [pipe.recv() for pipe in self._pipes]
        for _, error in answers:
            if error is not None:
                raise AssertionError(error)
        return [result for result, _ in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            process.kill()


def _serve(pipe: Connection, rank: int, port: int) -> None:
    # pytest names a test's module from here, without having the folder on its path.
    sys.path.append(str(Path(__file__).parents[1]))
    os.environ |= environment(rank, port)
    import torch
    from transformers.utils.logging import disable_progress_bar

    from sodfast.parallel import ranks as distributed

    torch.set_num_threads(1)
    disable_progress_bar()
    distributed.PATIENCE = timedelta(seconds=90)  # a deadlock is an error soon
    with distributed.join() as ranks:
        while (order := pipe.recv()) is not None:
            function, arguments = order
            try:
                pipe.send((function(ranks, *arguments), None))
            except BaseException:
                pipe.send((None, f"rank {rank}: {traceback.format_exc()}"))


def environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells its processes."""
    return {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(SIZE),
        "LOCAL_WORLD_SIZE": str(SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
