"""Everything the kernels and the rollouts have to show on a GPU, in parts.

    python bench/gpu_suite.py PART ... [--out FOLDER] [--budget-minutes M] [--without PEER ...]

    correctness   gradients, updates and samples against fp64, at size; accuracy beside the peers'
    objective     the linear form against four bare products and against peers
    logits        the logits form against the bandwidth of a copy
    parameters    copy, average and AdamW against the bandwidth of a copy and against peers
    sampling      drawing tokens
    rollout       the native engine: needs sodfast and what it needs; all others torch and triton

Each part takes at most 8 minutes and 78 GiB of an H100 or H200. Results go to FOLDER ($OUT, or
bench/results/<gpu>): PART.json, written after every case; targets.md, the table of targets; plots,
if matplotlib is installed. A case that is there already, made with the same versions, devices and
sources, is not repeated: the same command again does what is left.

`--budget-minutes`: no case is started that would probably end later (8 a part by default).
`--without`: peers that are not expected here (trl, liger, fla, torchao, flashinfer); any other that
is absent or fails is a MISS.
`--rehearse`: tiny sizes on the CPU, kernels in Triton's interpreter; times mean nothing then.
`--profile TEXT`: once more the cases whose name contains it; no figure is kept. What each kernel
took stands in FOLDER/PART.profile.txt. Within ncu the same option chooses what ncu looks at.
`--list`: the cases, without running any.

Exit code 0: every target is met, but for what this machine cannot show (a second GPU) and what was
left out with `--without`; 1: one is missed; 2: this machine cannot run the suite; 3: none is
missed, but the budget left something out.
"""

import argparse
import gc
import os
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# This checkout's sources, wherever the command is started and whatever is installed.
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "kernels"), str(ROOT)]

# The module of each part; its `cases(plan)` are what there is to run.
PARTS = {
    "correctness": "suite_correctness",
    "objective": "bench_objective",
    "logits": "bench_logits",
    "parameters": "bench_parameters",
    "sampling": "bench_sampling",
    "rollout": "suite_rollout",
}
# What judges figures does not change them.
JUDGE = "suite_targets.py"
MINUTES_A_PART = 8
MEMORY_BYTES = 78 << 30


def main(
    arguments: list[str] | None = None,
    name: str = "gpu_suite",
    description: str | None = __doc__,
    parts: dict[str, str] | None = None,
) -> int:
    """The suite `name`: of this file, or one with `parts` of its own, which are run alike."""
    known = PARTS if parts is None else parts
    options = parse(arguments, description, known)
    if options.rehearse:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported
    import torch
    from suite_record import Plan

    if not options.rehearse and not options.list and not torch.cuda.is_available():
        print(f"bench/{name}.py needs a CUDA device; --rehearse runs it on a CPU")
        return 2
    gpu = not options.rehearse and torch.cuda.is_available()
    # Some of torch's functions refuse a GPU without its index.
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    plan = Plan(device, full=not options.rehearse, without=frozenset(options.without))
    if options.list:
        for part in options.parts:
            for case in import_module(known[part]).cases(plan):
                print(f"{part:12} {case.minutes:4.1f} min  {case.name}")
        return 0
    if gpu:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY_BYTES / total))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.profile is not None:
        return profile(options, known, plan)
    minutes = options.budget_minutes or MINUTES_A_PART * len(options.parts)
    deadline = time.monotonic() + 60 * minutes
    for part in options.parts:
        run_part(part, import_module(known[part]), plan, options.out, deadline)
    table = "targets.md" if parts is None else f"{name}.md"
    return report(options.parts, list(known), options.out, table)


def parse(arguments: list[str] | None, description: str | None, known: dict[str, str]) -> Any:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(known)}; all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budget-minutes", type=float)
    parser.add_argument("--without", nargs="+", default=[], metavar="PEER", type=str.lower)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--profile", metavar="TEXT")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_intermixed_args(arguments)
    options.parts = options.parts or list(known)
    for part in options.parts:
        if part not in known:
            parser.error(f"no part {part!r}; there are {', '.join(known)}")
    options.out = options.out or default_folder(options.rehearse)
    return options


def default_folder(rehearse: bool) -> Path:
    if "OUT" in os.environ:
        return Path(os.environ["OUT"])
    import torch

    gpu = torch.cuda.is_available() and not rehearse
    name = torch.cuda.get_device_name().replace(" ", "-") if gpu else "rehearsal"
    return ROOT / "bench" / "results" / name


def run_part(part: str, module: Any, plan: Any, folder: Path, deadline: float) -> None:
    """Its cases one after the other, each into the part's JSON as it ends."""
    from suite_record import Record, versions

    sources = [path for path in (ROOT / "bench").glob("suite_*.py") if path.name != JUDGE]
    sources += [Path(module.__file__), *(ROOT / "kernels").rglob("*.py")]
    sources += getattr(module, "SOURCES", [])
    # What the part before leaves, such as a trainer, may be in cycles that only a collection frees.
    lost = fault_of_device(plan)
    cases = module.cases(plan)
    made, names = versions(plan, sources), [case.name for case in cases]
    record = Record(folder / f"{part}.json", part, made, names, plan.without)
    for case in cases:
        left = (deadline - time.monotonic()) / 60
        if record.has(case.name):
            progress(part, case.name, "is there already")
        elif lost or left < case.minutes * plan.full:
            reason = lost or f"{left:.1f} minutes left of the budget, it takes {case.minutes}"
            record.leave_out(case.name, reason)
            progress(part, case.name, f"not run: {reason}")
        else:
            result = attempt(case)
            record.add(case.name, result)
            progress(part, case.name, summary(result))
            lost = fault_of_device(plan)


def profile(options: Any, known: dict[str, str], plan: Any) -> int:
    """Runs the chosen cases under torch's profiler: 0, or 2 where no case has such a name."""
    import torch
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU]
    if plan.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    tables: dict[str, list[str]] = {}
    for part in options.parts:
        for case in import_module(known[part]).cases(plan):
            if options.profile not in case.name:
                continue
            with torch.profiler.profile(activities=activities) as seen:
                result = attempt(case)
            progress(part, case.name, summary(result))
            order = "self_cuda_time_total" if len(activities) > 1 else "self_cpu_time_total"
            table = seen.key_averages().table(sort_by=order, row_limit=40)
            tables.setdefault(part, []).append(f"{case.name}: {summary(result)}\n{table}\n")
    for part, texts in tables.items():
        (options.out / f"{part}.profile.txt").write_text("\n".join(texts))
    if not tables:
        print(
            f"--profile: no case of {', '.join(options.parts)} has {options.profile!r} in its name"
        )
        return 2
    return 0


def attempt(case: Any) -> dict[str, Any]:
    """A case's result. Its fault is a result too: the cases after it still have a chance, and the
    exit code tells."""
    from suite_record import Skipped

    start = time.monotonic()
    try:
        result: dict[str, Any] = case.run()
    except Skipped as reason:
        result = {"skipped": str(reason)}
    except Exception as reason:
        result = {"failed": f"{type(reason).__name__}: {reason}"[:2000]}
    result["seconds"] = round(time.monotonic() - start, 2)
    return result


def fault_of_device(plan: Any) -> str:
    """Empties the cache; the reason if the device answers nothing any more."""
    import torch

    gc.collect()
    if plan.device.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as reason:
            return f"the device is lost: {reason}"[:300]
    return ""


def summary(result: dict[str, Any]) -> str:
    if "failed" in result or "skipped" in result:
        found = f"failed: {result['failed']}" if "failed" in result else result["skipped"]
        return f"{result['seconds']:.1f} s, {found}"
    missed = [row["check"] for row in result.get("checks", []) if not row["met"]]
    absent = [row["name"] for row in result.get("rows", []) if "failed" in row]
    times = [
        f"{row['name']} {row['milliseconds']:.4g} ms"
        for row in result.get("rows", [])
        if "milliseconds" in row
    ]
    said = [f"MISS {name}" for name in missed] + [f"failed {name}" for name in absent] + times
    return "; ".join([f"{result['seconds']:.1f} s", *said])


def progress(part: str, name: str, text: str) -> None:
    print(f"{part}: {name}: {text}", flush=True)


def report(parts: list[str], known: list[str], folder: Path, file: str) -> int:
    """Table (in `file`) and plots of what the folder holds, and the exit code by the parts of this
    command."""
    from suite_targets import VERDICTS, judge, table

    (folder / file).write_text(table(judge(folder, known)))
    targets = judge(folder, parts)
    if find_spec("matplotlib"):
        from plot_suite import draw

        draw(folder)
    for target in targets:
        if target.verdict != "pass":
            print("  ".join(target.line()))
    verdicts = [target.verdict for target in targets]
    counts = {verdict: verdicts.count(verdict) for verdict in VERDICTS}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 1 if counts["MISS"] else 3 if counts["not run"] else 0


if __name__ == "__main__":
    sys.exit(main())
