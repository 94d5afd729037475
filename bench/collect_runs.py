"""Collect run directories into one JSON of figures: `python bench/collect_runs.py RUN_DIR... > F`.

Everything a README table quotes comes from here: summary, evaluation curve, environment.
"""

import json
import sys
from pathlib import Path
from typing import Any

from sodfast.files import read_lines


def collect(run: Path) -> dict[str, Any]:
    """A run's summary, its evaluations by step, its lengths and entropies every tenth step."""
    lines = read_lines(run / "metrics.jsonl")
    environment = json.loads((run / "environment.json").read_text())
    every_tenth = [line for line in lines if line["step"] % 10 == 0 and line["step"] > 0]
    return {
        "name": run.name,
        "command": "sodfast " + " ".join(environment.pop("command")[1:]),
        "summary": json.loads((run / "summary.json").read_text()),
        "eval/mean@16": {
            line["step"]: line["eval/mean@16"] for line in lines if "eval/mean@16" in line
        },
        "length/mean": {line["step"]: line["length/mean"] for line in every_tenth},
        "policy/entropy": {line["step"]: line["policy/entropy"] for line in every_tenth},
        "environment": environment,
    }


if __name__ == "__main__":
    print(json.dumps([collect(Path(path)) for path in sys.argv[1:]], indent=1))
