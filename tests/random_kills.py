"""Runs of every kind that are killed at random moments, again and again, and resumed to their end.

    python -m random_kills [--kills N] [--only VARIANT] [--seed N]      (in tests/)

Whatever a kill by SIGKILL has left, `train --resume` (or, before there is a configuration, the same
command) goes on from it. At the end every file of the run must be what an undisturbed run leaves:
metrics, events, answers, summary and every checkpoint, byte for byte but for times and memory.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

import forked
from crash_points import Files, contents, fresh
from fuzz.world import TINY_LAB

KILLS_OF_A_RUN = 5  # at most: after these it is let go to its end
_RUN = [
    *(text for text in TINY_LAB if not text.startswith(("schedule.", "eval.", "checkpoint."))),
    *("task.train=12", "optimizer.updates_per_step=2", "steps=9", "out=run"),
    *("eval.every=3", "eval.samples=2", "checkpoint.every=2", "log.samples_every=1"),
]
_GATES = ["schedule.kind=cgtr", "schedule.min_isolation=2", "schedule.reward_margin=0.0"]
VARIANTS = {
    "fixed": ["schedule.kind=fixed"],
    "hard": ["schedule.kind=hard", "schedule.every=3", "checkpoint.keep=1", "checkpoint.best=true"],
    "ema": ["schedule.kind=ema", "schedule.rate=0.3"],
    "trust region": ["schedule.kind=trust_region", "schedule.rate=0.3"],
    "cgtr": [*_GATES, "schedule.check_every=2", "schedule.window=3", "schedule.gates=[isolation]"],
    "evidence": [
        *("schedule.kind=evidence", "schedule.min_isolation=0", "schedule.probe_every=2"),
        *("schedule.probe_questions=2", "schedule.probes=2", "schedule.min_z=-9"),
    ],
    "host teacher": ["schedule.kind=hard", "schedule.every=3", "teacher.storage=host"],
    "bf16, 8 bits": ["schedule.kind=ema", "model.dtype=bfloat16", "optimizer.adamw=8bit"],
    "adapters": ["schedule.kind=hard", "schedule.every=3", "model.lora.rank=2"],
    "collapse": [
        *("schedule.kind=fixed", "collapse.stop=true"),
        *("collapse.length_steps=3", "collapse.length_fraction=0.01"),
    ],
}


def kill_often(
    world: Path, command: list[str], expected: Files, seconds: float, rng: Random
) -> tuple[int, str]:
    """How often a run was killed before it ended, and what is wrong then; empty: nothing.

    `seconds`: what an undisturbed run takes.
    """
    case, kills = fresh(world, "empty"), 0
    while True:
        begun = (case / "run" / "config.yaml").is_file()
        ended = forked.run(
            ["train", "--resume", "run"] if begun else command,
            case,
            cpu_seconds=120,
            wall_seconds=rng.uniform(0, seconds) if kills < KILLS_OF_A_RUN else forked.WALL_SECONDS,
        )
        if ended.code != -signal.SIGKILL:
            break
        kills += 1
    if ended.code:
        return kills, f"exit code {ended.code}: {ended.err[-2000:]}"
    found = contents(case / "run")
    names = sorted(found.keys() | expected.keys())
    return kills, ", ".join(name for name in names if found.get(name) != expected.get(name))


def campaign(world: Path, wanted: int, variants: list[str], seed: int) -> bool:
    """Kill runs of the variants in turn, `wanted` times, and print a table; whether all held."""
    (world / "empty").mkdir()
    lab = ["train", "lab", *TINY_LAB, "steps=1", "out=lab-run"]
    for command in (lab, ["export", "lab-run", "model"]):
        ended = forked.run(command, world, cpu_seconds=120)
        assert ended.code == 0, ended.err
    forked.load(world / "model")
    undisturbed, runs, kills, failed = {}, Counter[str](), Counter[str](), Counter[str]()
    for name in variants:
        command = ["train", "lab", *_RUN, *VARIANTS[name], f"model.path={world / 'model'}"]
        case, begin = fresh(world, "empty"), time.monotonic()
        ended = forked.run(command, case, cpu_seconds=120)
        assert ended.code == 0, ended.err
        undisturbed[name] = command, contents(case / "run"), time.monotonic() - begin
    number = 0
    while kills.total() < wanted:
        name = variants[number % len(variants)]
        command, expected, seconds = undisturbed[name]
        killed, wrong = kill_often(world, command, expected, seconds, Random(f"{seed}:{number}"))
        runs[name] += 1
        kills[name] += killed
        failed[name] += bool(wrong)
        if wrong:
            print(f"{name}, run {number}, {killed} kills: {wrong}", flush=True)
        number += 1
    for name in variants:
        files = len(undisturbed[name][1])
        print(
            f"{name:14} {runs[name]:4} runs {kills[name]:5} kills {files:4} files "
            f"{failed[name]:4} failed"
        )
    print(f"{'all':14} {runs.total():4} runs {kills.total():5} kills {failed.total():15} failed")
    return not failed.total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=332)
    parser.add_argument("--only", choices=VARIANTS)
    parser.add_argument("--seed", type=int, default=time.time_ns())
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_OFFLINE"] = "1"
    forked.prepare()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="sodfast-kills-") as folder:
        os.environ["SODFAST_CACHE"] = str(Path(folder) / "cache")
        names = [arguments.only] if arguments.only else list(VARIANTS)
        held = campaign(Path(folder), arguments.kills, names, arguments.seed)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
