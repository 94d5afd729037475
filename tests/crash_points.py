"""Every command that writes, killed at every point where the disk changes for good, and continued.

    python -m crash_points [--every N] [--only SCENARIO[:POINT]]      (in tests/)

A point lies before or after a rename, replace, fsync, link, unlink, rmdir, mkdir or rmtree. For
each point the command is started anew and ends there by SIGKILL; then what a user would do is done:
the same command again, or --resume where there is a run. What is then on disk must be what the
undisturbed command leaves, byte for byte but for times and memory.
"""

import argparse
import functools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
from fuzz.world import TINY_LAB
from synthetic import write_study

OPERATIONS = ("rename", "replace", "fsync", "link", "unlink", "rmdir", "mkdir")
Files = dict[str, Any]


def arm(point: int, count: Path) -> None:
    """Kill this process at the point of that number; `count` gets a byte for each one passed."""
    log = os.open(count, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    passed = 0

    def pass_point() -> None:
        nonlocal passed
        if passed == point:
            os.kill(os.getpid(), signal.SIGKILL)
        passed += 1
        os.write(log, b".")

    def with_points(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **keys: Any) -> Any:
            pass_point()
            result = function(*arguments, **keys)
            pass_point()
            return result

        return call

    for name in OPERATIONS:
        setattr(os, name, with_points(getattr(os, name)))
    shutil.rmtree = with_points(shutil.rmtree)  # type: ignore[assignment]


def contents(folder: Path) -> Files:
    """Every file below but locks and a report's temporary ones, which nobody can know to be left;
    lines without what depends on the clock."""
    found: Files = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        of_report = name.startswith(("report.html", "tables/", "figures/")) and ".tmp" in name
        if not file.is_file() or of_report or file.name == ".lock":
            continue
        if name.startswith("logs/") or file.name == "environment.json":
            continue
        found[name] = file.read_bytes()
        if file.suffix == ".jsonl":
            found[name] = [_timeless(json.loads(line)) for line in found[name].splitlines()]
            found[name] = [line for line in found[name] if line]
    return found


def _timeless(line: dict[str, Any]) -> dict[str, Any]:
    if line.get("event") in ("resume", "checkpoint"):
        return {}
    return {k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))}


@dataclass(frozen=True)
class Scenario:
    """`start`: a folder of the world that is copied to where the command runs; `result`: the folder
    that is compared; `again`: the commands that a user types after the kill."""

    start: str
    command: list[str]
    result: str
    again: Callable[[Path], list[list[str]]]


def scenarios(world: Path) -> dict[str, Scenario]:
    """The commands, on real runs that this makes: `one` ends at step 2, `study` has two trials."""
    schedule = ["schedule.kind=hard", "schedule.every=2", "eval.every=2", "checkpoint.keep=1"]
    kept = [*schedule, "log.samples_every=1", f"model.path={world / 'model'}", "out=run"]
    run = [*TINY_LAB[:-3], *kept]
    for folder in ("empty", "one", "study"):
        (world / folder).mkdir()
    _command(world, "train", "lab", *TINY_LAB, "steps=1", "out=lab-run")
    _command(world, "export", "lab-run", "model")
    forked.load(world / "model")
    _command(world / "one", "train", "lab", *run, "steps=2")
    study = {"base": "lab", "overrides": {"steps": 4}, "axes": {"seed": [0, 1]}}
    write_study(world / "study" / "swept", study)
    shutil.copyfile(world / "study" / "swept" / "study.yaml", world / "study" / "sweep.yaml")

    def go_on(case: Path, name: str, otherwise: list[str]) -> list[list[str]]:
        begun = (case / name / "config.yaml").is_file()
        return [["train", "--resume", name] if begun else otherwise]

    train = ["train", "lab", *run, "steps=3"]
    fork = ["fork", "run", "step=2", "out=new", "steps=4", "schedule.every=1"]
    export = ["export", "run", "new"]
    more = ["train", "--resume", "run", "steps=4"]
    report = ["report", "run"]
    sweep = ["sweep", "sweep.yaml", "out=swept"]
    return {
        "train": Scenario("empty", train, "run", lambda case: go_on(case, "run", train)),
        # Without steps= it ends at either; with it, as if it had never been killed.
        "resume": Scenario("one", more, "run", lambda case: [more[:3], more]),
        "fork": Scenario("one", fork, ".", lambda case: go_on(case, "new", fork)),
        "export": Scenario(
            "one", export, ".", lambda case: [] if (case / "new").exists() else [export]
        ),
        "report": Scenario("one", report, "run", lambda case: [report]),
        "sweep": Scenario("study", sweep, "swept", lambda case: [sweep]),
    }


def _command(folder: Path, *arguments: str) -> None:
    ended = forked.run(list(arguments), folder, cpu_seconds=120)
    if ended.code:
        raise RuntimeError(f"{' '.join(arguments)}: {ended.code}\n{ended.out}\n{ended.err}")


def try_point(world: Path, scenario: Scenario, point: int, expected: Files) -> str:
    """What is wrong after a kill at this point; empty: nothing."""
    case = fresh(world, scenario.start)
    ended = forked.run(scenario.command, case, lambda: arm(point, world / "count"), 120)
    if ended.code != -signal.SIGKILL:
        return f"not killed: {ended.code} {ended.err}"
    for command in scenario.again(case):
        ended = forked.run(command, case, cpu_seconds=120)
        if ended.code:
            return f"{' '.join(command)}: exit code {ended.code}: {ended.err[-2000:]}"
    found = contents(case / scenario.result)
    if found != expected:
        return ", ".join(
            name
            for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)
        )
    return ""


def fresh(world: Path, start: str) -> Path:
    """A copy of that folder of the world where every case runs: a run's files name it."""
    case = world / "case"
    if case.exists():
        shutil.rmtree(case)
    return Path(shutil.copytree(world / start, case))


def try_all(world: Path, every: int, only: str) -> bool:
    """Try every `every`-th point of each scenario, print a table; whether all held."""
    wanted, _, number = only.partition(":")
    held, begin = True, time.monotonic()
    for name, scenario in scenarios(world).items():
        if wanted not in ("", name):
            continue
        count = world / "count"
        count.unlink(missing_ok=True)
        case = fresh(world, scenario.start)
        ended = forked.run(scenario.command, case, lambda count=count: arm(-1, count), 120)
        assert ended.code == 0, ended.err
        points, expected = count.stat().st_size, contents(case / scenario.result)
        assert expected and points
        chosen = [int(number)] if number else range(every // 2, points, every)
        failures = [
            (p, wrong) for p in chosen if (wrong := try_point(world, scenario, p, expected))
        ]
        for point, wrong in failures:
            print(f"{name}:{point}: {wrong}")
        held = held and not failures
        print(
            f"{name:8} {points:5} points {len(chosen):5} killed {len(failures):4} failed "
            f"({time.monotonic() - begin:.0f} s)",
            flush=True,
        )
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--only", default="", metavar="SCENARIO[:POINT]")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_OFFLINE"] = "1"
    forked.prepare()
    with tempfile.TemporaryDirectory(prefix="sodfast-crash-") as folder:
        os.environ["SODFAST_CACHE"] = str(Path(folder) / "cache")
        held = try_all(Path(folder), arguments.every, arguments.only)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
