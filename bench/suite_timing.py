"""Times that compare: cases take turns, the GPU's time and the host's are measured apart.

A GPU that has to wait for Python looks slow. So a spin kernel goes first, during which Python
enqueues the whole call; the events around the call then see the GPU alone. What the host needs for
the same call is measured in turns of their own, without the spin.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch

Run = Callable[[], object]
ROUNDS = {"cuda": 7, "cpu": 3}
HOST_ROUNDS = 3
# More than any GPU's clock: what spins is then never shorter than it should be.
CYCLES_PER_SECOND = 2.5e9
LONGEST_SPIN = 0.1
GIB = 1 << 30


class Work(NamedTuple):
    """run: what is timed. clear: gives back what an earlier turn has left, such as gradients."""

    run: Run
    clear: Run = lambda: None


def take_turns(
    works: dict[str, Work], device: torch.device, rounds: int | None = None
) -> dict[str, dict[str, Any]]:
    """A row for each: medians of interleaved rounds, or `failed` with the reason.

    milliseconds: of the GPU; of the host where there is none. spread: (slowest − fastest)/median.
    host_milliseconds: what the host needs for the call; a call that waits for the GPU waits here.
    held_bytes: what the call leaves allocated (gradients). extra_bytes: its peak above that.
    """
    rounds = rounds or ROUNDS[device.type]
    rows: dict[str, dict[str, Any]] = {name: {} for name in works}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in works}
    hosts: dict[str, list[float]] = {name: [] for name in works}
    gpu = device.type == "cuda"
    warm_up = 1 + (HOST_ROUNDS if gpu else 0)  # the first turn compiles
    for number in range(warm_up + rounds):
        for name, work in works.items():
            if "failed" in rows[name]:
                continue
            try:
                if number >= warm_up:
                    spin = min(LONGEST_SPIN, 1.5 * max(hosts[name], default=0.0) + 5e-4)
                    turns[name].append(gpu_turn(work, spin) if gpu else cpu_turn(work))
                else:
                    taken = host_seconds(work, device)
                    if number:
                        hosts[name].append(taken)
            except Exception as reason:  # one case's fault must not hide the others' times
                rows[name]["failed"] = f"{type(reason).__name__}: {reason}"[:300]
            if "failed" in rows[name]:
                work.clear()
                if gpu:
                    torch.cuda.empty_cache()
    for name, taken in turns.items():
        if "failed" not in rows[name]:
            rows[name] = summarise(taken, hosts[name])
    return rows


def summarise(turns: list[dict[str, float]], hosts: list[float]) -> dict[str, Any]:
    seconds = [turn["seconds"] for turn in turns]
    row: dict[str, Any] = {
        "milliseconds": 1e3 * median(seconds),
        "spread": (max(seconds) - min(seconds)) / median(seconds),
    }
    if hosts:
        row["host_milliseconds"] = 1e3 * median(hosts)
    for key in turns[0].keys() - {"seconds"}:
        row[key] = max(turn[key] for turn in turns)
    return row


def cpu_turn(work: Work) -> dict[str, float]:
    work.clear()
    start = time.perf_counter()
    work.run()
    return {"seconds": time.perf_counter() - start}


def gpu_turn(work: Work, spin: float) -> dict[str, float]:
    """One call: the GPU's seconds and its memory."""
    work.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(spin * CYCLES_PER_SECOND))
    begin.record()
    work.run()
    end.record()
    end.synchronize()
    held = torch.cuda.memory_allocated() - before
    return {
        "seconds": begin.elapsed_time(end) / 1e3,
        "held_bytes": held,
        "extra_bytes": torch.cuda.max_memory_allocated() - before - held,
    }


def host_seconds(work: Work, device: torch.device) -> float:
    """From the call to its return, the GPU idle before it."""
    work.clear()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work.run()
    taken = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return taken


def clock(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Ceiling(NamedTuple):
    """work: what is timed. amount: the bytes or flops of one turn."""

    work: Work
    amount: float


def copy_ceiling(device: torch.device, full: bool) -> Ceiling:
    """A copy of random bytes, 2 GiB in full; read and written count."""
    size = 2 * GIB if full else 16 << 20
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceiling(Work(lambda: target.copy_(source)), 2 * size)


def product_ceiling(device: torch.device, full: bool) -> Ceiling:
    """A bf16 product, 8192³ in full, on random data: zeros are faster to multiply."""
    side = 8192 if full else 64
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return Ceiling(Work(lambda: left @ right), 2 * side**3)


def ceilings(device: torch.device, full: bool) -> dict[str, float]:
    """What the machine can do: a copy's bytes a second, and a product's flops a second."""
    found = {
        "copy_bytes_per_second": copy_ceiling(device, full),
        "product_flops_per_second": product_ceiling(device, full),
    }
    rows = take_turns({name: ceiling.work for name, ceiling in found.items()}, device, rounds=11)
    return {
        name: ceiling.amount / rows[name]["milliseconds"] * 1e3 for name, ceiling in found.items()
    }
