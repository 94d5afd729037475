"""`make fuzz`: damaged files and hostile texts, one command each, and a table of what came of them.

    python -m fuzz.campaign --minutes 60 --seed 0      (in tests/)
    python -m fuzz.campaign --only "metrics:17"        one case again, with all it printed

A case has failed when the command ended by a signal, a traceback or an unknown exit code, said
anything but one line of what is wrong, took more than 10 s of processor time, wrote outside of its
directories, or refused its arguments (exit code 2) and had written all the same.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

import forked
from fuzz.mutations import damage_file
from fuzz.readers import READERS, TEXTS
from fuzz.world import build_world

Snapshot = dict[str, tuple[int, ...]]


def snapshot(folder: Path) -> Snapshot:
    """Every name below but locks and what is cached, and what changes when it is written."""
    found = {}
    for path in folder.rglob("*"):
        if path.name != ".lock" and path.relative_to(folder).parts[0] != "cache":
            stat = path.lstat()
            changes = () if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
            found[str(path.relative_to(folder))] = (stat.st_mode, stat.st_ino, *changes)
    return found


def judge(ended: forked.Ended, written: bool, outside: bool) -> str:
    """What is wrong with how a command ended; empty: nothing."""
    lines = ended.err.splitlines()
    if ended.code < 0:
        return f"signal {-ended.code} after {ended.seconds:.1f} s"
    if "Traceback" in ended.err or "Traceback" in ended.out:
        return "a traceback"
    if outside:
        return "something outside was written"
    if ended.code not in (0, 1, 2):
        return f"exit code {ended.code}"
    said = [line for line in lines if line.startswith("sodfast: ")]
    if ended.code == 2 and (len(lines) != 1 or len(said) != 1):
        return f"{len(lines)} lines on standard error for exit code 2"
    if ended.code == 2 and len(lines[0]) > 3000:
        return f"a line of {len(lines[0])} characters"
    if ended.code == 2 and written:
        return "written although refused"
    return ""


def try_case(world: Path, category: str, number: int, seed: int) -> tuple[str, str]:
    """What is wrong (empty: nothing), and the case with all that was printed."""
    rng = Random(f"{seed}:{category}:{number}")
    case = Path(tempfile.mkdtemp(prefix="case-", dir=world))
    try:
        done = []
        if category in TEXTS:
            command = TEXTS[category](rng)
        else:
            reader = READERS[category]
            for part in reader.parts:
                copy = shutil.copytree if (world / part).is_dir() else shutil.copyfile
                copy(world / part, case / part)
            command = rng.choice(reader.commands)
            for _ in range(rng.choice([1, 1, 1, 2])):
                files = sorted(f for glob in reader.files for f in case.glob(glob) if f.is_file())
                named = [f for f in files if any(f.name in text for text in command)]
                files = named or files
                if files:
                    file = rng.choice(files)
                    done.append(
                        f"{file.relative_to(case)}: {damage_file(file, world / 'outside', rng)}"
                    )

        def before() -> None:
            os.environ["SODFAST_CACHE"] = str(case / "cache")

        outside = snapshot(world / "outside")
        files_before = snapshot(case)
        ended = forked.run(command, case, before)
        wrong = judge(ended, snapshot(case) != files_before, snapshot(world / "outside") != outside)
        shown = [text if len(text) < 200 else f"{text[:200]}…" for text in command]
        story = (
            f"{' '.join(shown)!r} {done} → {ended.code}, {ended.seconds:.1f} s\n{ended.err[-3000:]}"
        )
        return wrong, f"{category}:{number} {wrong}\n{story}"
    finally:
        shutil.rmtree(case)


def table(tried: Counter[str], failed: Counter[str]) -> str:
    rows = [(name, tried[name], failed[name]) for name in sorted(tried)]
    rows.append(("all", tried.total(), failed.total()))
    return "\n".join(f"{name:14} {n:7,} tried {bad:5,} failed" for name, n, bad in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--cases", type=int, default=2**62, help="of each category, at most")
    parser.add_argument("--seed", type=int, default=time.time_ns())
    parser.add_argument("--only", metavar="CATEGORY[:NUMBER]")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_OFFLINE"] = "1"
    forked.prepare()
    tried, failed = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="sodfast-fuzz-") as folder:
        world = Path(folder)
        os.environ["SODFAST_CACHE"] = str(world / "cache")
        build_world(world)
        end = time.monotonic() + 60 * arguments.minutes
        names, number = [*READERS, *TEXTS], 0
        if arguments.only:
            name, _, first = arguments.only.partition(":")
            names, number = [name], int(first or 0)
            arguments.cases = number + 1 if first else arguments.cases
        print(f"seed {arguments.seed}", flush=True)
        while time.monotonic() < end and number < arguments.cases:
            for name in names:
                wrong, story = try_case(world, name, number, arguments.seed)
                tried[name] += 1
                failed[name] += bool(wrong)
                if wrong or ":" in (arguments.only or ""):
                    print(story, flush=True)
            number += 1
    print(table(tried, failed))
    sys.exit(1 if failed.total() else 0)


if __name__ == "__main__":
    main()
