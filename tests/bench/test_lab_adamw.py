"""The comparison of variants: its numbers by hand, the processes it starts, what it runs anew."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

KEYS = ["model.dtype=bfloat16", "optimizer.adamw=8bit", "seed=2"]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
    import lab_adamw

    return lab_adamw


def write_run(path: Path, values: list[float], drift: float = 0.0, status: str = "done") -> Path:
    """A run whose every second step is evaluated."""
    path.mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"step": 0, "eval/mean@16": values[0]}]
    for step in range(1, 2 * len(values) - 1):
        line = {"step": step, "teacher/drift": drift + step, "length/mean": 9, "policy/entropy": 1}
        lines.append(line | ({} if step % 2 else {"eval/mean@16": values[step // 2]}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "summary.json").write_text(json.dumps({"status": status}))
    (path / "environment.json").write_text(json.dumps({"command": ["sodfast", "train"]}))
    return path


def test_gaps_are_taken_seed_by_seed(bench: Any, tmp_path: Path) -> None:
    values = {
        "float32-torch": [[0.4, 0.5, 0.8], [0.4, 0.3, 0.6]],
        "bfloat16-8bit": [[0.4, 0.4, 0.7], [0.4, 0.3, 0.4]],
    }
    paths = {
        variant: [write_run(tmp_path / f"{variant}-{i}", run, i) for i, run in enumerate(runs)]
        for variant, runs in values.items()
    }
    found = bench.compare(paths)
    reference = found["variants"]["float32-torch"]
    assert reference["final"] == [0.8, 0.6]
    assert reference["mean"] == pytest.approx(0.7) and reference["stderr"] == pytest.approx(0.1)
    assert reference["curve"] == pytest.approx({0: 0.4, 2: 0.4, 4: 0.7})
    assert reference["moved"] == [4, 5]
    # final: −0.1 and −0.2; mean of steps 2 and 4: −0.1 and −0.1
    (gap,) = found["gaps"].values()
    assert gap["final"] == pytest.approx({"mean": -0.15, "stderr": 0.05})
    assert gap["all evaluations"] == pytest.approx({"mean": -0.1, "stderr": 0.0}, abs=1e-12)
    assert [run["name"] for run in found["runs"]] == [p.name for ps in paths.values() for p in ps]
    json.dumps(found)


def test_what_is_finished_stays_and_what_was_cut_is_resumed(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command))
    done = write_run(tmp_path / "done", [0.4, 0.5])
    cut = write_run(tmp_path / "cut", [0.4, 0.5], status="interrupted")
    (cut / "config.yaml").touch()
    for path in (done, cut, tmp_path / "new"):
        bench.train(path, "bfloat16-8bit", 2, ["steps=4"])
    assert [command[1:5] for command in commands] == [
        ["-m", "sodfast", "train", c] for c in ("--resume", KEYS[0])
    ]
    assert commands[0][5:] == [str(cut)]
    assert commands[1][4:] == [*KEYS, f"out={tmp_path / 'new'}", "steps=4"]
