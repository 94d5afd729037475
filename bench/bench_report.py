"""How long a report takes and how much memory: `python bench/bench_report.py`.

Invented runs (tests/synthetic.py) of the sizes that must be reported in less than 60 s and 2 GB
on one core: a run of 10,000 steps, and a study of 200 runs of 300 steps. Each report is made by
the command in a process of its own. The last line is JSON: wall and CPU seconds, peak RSS, bytes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from synthetic import lab_run, write_run, write_study  # noqa: E402


def measure(directory: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "sodfast", "report", str(directory)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise RuntimeError(f"{command} failed")
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_mib": usage.ru_maxrss // 1024,
        "html_bytes": (directory / "report.html").stat().st_size,
    }


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    found = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_run(place / "long", lab_run("steps=10000"))
        write_run(place / "long_hard", lab_run("steps=10000", "schedule={kind: hard, every: 1}"))
        schedules = [{"kind": "cgtr"}, *({"kind": "hard", "every": m} for m in (1, 2, 5, 20))]
        axes = {
            "schedule": schedules,
            "optimizer.lr": [1e-5, 2e-5, 3e-5, 5e-5, 7e-5, 1e-4, 1.5e-4, 3e-4],
            "seed": [0, 1, 2, 3, 4],
        }
        overrides = {"steps": 300}
        write_study(place / "study", {"base": "lab", "overrides": overrides, "axes": axes})
        for directory in sorted(place.iterdir()):
            found[directory.name] = measure(directory)
            print(directory.name, found[directory.name], flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
