"""What the suite has found: one JSON for each part, rewritten as a whole after every case.

A part's file:

    part       its name
    versions   what the figures were made with; other versions start the file anew
    without    the peers that were not expected
    cases      {name: result}; a result has `seconds`, and either
                   checks    [{check, value, limit, at_most, met}]
                   rows      [{name, milliseconds, …} or {name, failed: reason}]
               or    skipped: reason    (this machine cannot run it, nothing is wrong)
               or    failed: reason     (is tried again the next time)
    not_run    {name: reason}; from the start every case that has no result yet
"""

import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "flash-linear-attention",
    "torchao",
    "flashinfer-python",
)

Result = dict[str, Any]


class Skipped(Exception):
    """Raised by a case that this machine cannot run; the message is the reason."""


class Plan(NamedTuple):
    """Where and at which sizes cases run.

    device: a CUDA device, or the CPU in a rehearsal and in the CPU benches.
    full: the sizes that targets are about; otherwise tiny ones, where times mean nothing.
    without: the peers that are not expected here.
    """

    device: torch.device
    full: bool
    without: frozenset[str] = frozenset()


class Case(NamedTuple):
    """minutes: what it takes on an H100 or H200 at most, compilation included (an estimate)."""

    name: str
    minutes: float
    run: Callable[[], Result]


def check(name: str, value: float, limit: float, at_most: bool = True) -> dict[str, Any]:
    """One thing that must hold. A value that is not a number meets nothing."""
    met = value <= limit if at_most else value >= limit
    return {"check": name, "value": value, "limit": limit, "at_most": at_most, "met": met}


def worst(values: Iterable[float]) -> float:
    """The greatest, or NaN if any is NaN, which `max` would drop."""
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found)


def cpu_result(rows: list[Result], progress: Callable[[str], None]) -> Result:
    """What a bench on a CPU says. There are no peers there whose faults could be expected.

    Raises:
        RuntimeError: if a row failed.
    """
    for row in rows:
        progress(json.dumps(row))
        if "failed" in row:
            raise RuntimeError(f"{row['name']}: {row['failed']}")
    return {"device": "cpu", "torch": torch.__version__, "cases": rows}


class Record:
    """The JSON of one part, of which `names` are the cases."""

    def __init__(
        self,
        path: Path,
        part: str,
        versions: dict[str, Any],
        names: Iterable[str],
        without: Iterable[str],
    ) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "part": part,
            "versions": versions,
            "without": sorted(without),
            "cases": {},
        }
        if path.exists():
            before = json.loads(path.read_text())
            if before["versions"] == versions:
                finished = {n: c for n, c in before["cases"].items() if "failed" not in c}
                self.content["cases"] = finished
        # A case that ends the process must not look as if it had never been asked for.
        self.content["not_run"] = {
            name: "the command ended before it did" for name in names if not self.has(name)
        }
        self.write()

    def has(self, name: str) -> bool:
        return name in self.content["cases"]

    def add(self, name: str, result: Result) -> None:
        self.content["cases"][name] = result
        self.content["not_run"].pop(name, None)
        self.write()

    def leave_out(self, name: str, reason: str) -> None:
        self.content["not_run"][name] = reason
        self.write()

    def write(self) -> None:
        """The file is replaced in one step: whoever ends the process finds the old or the new."""
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=1))
        os.replace(partial, self.path)


def versions(plan: Plan, sources: Iterable[Path]) -> dict[str, Any]:
    """What figures depend on: packages, device, sizes, and the sources (a digest)."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    gpu = plan.device.type == "cuda"
    found["device"] = torch.cuda.get_device_name(plan.device) if gpu else platform.machine()
    found["full_sizes"] = plan.full
    digest = hashlib.sha256()
    for source in sorted(sources):
        digest.update(source.read_bytes())
    found["sources"] = digest.hexdigest()[:16]
    return found
