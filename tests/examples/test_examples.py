"""The examples run as a user starts them, in a folder outside of the checkout."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from pages import ROOT

EXAMPLES = ROOT / "examples"
SMALL = [
    "steps=4",
    "rollout.prompts_per_step=4",
    "rollout.max_new_tokens=16",
    "eval.samples=2",
    "eval.questions=4",
]


def run(name: str, arguments: Sequence[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_reward_of_the_own_task() -> None:
    reward = runpy.run_path(str(EXAMPLES / "own_task.py"))["reward"]
    said = ["84+5=89", "80+5=85?84+5=89", "80+5=85", "", "9"]
    assert reward([""] * 5, said, answer=["89"] * 5, id=None) == [1.0, 0.5, 0.0, 0.0, 0.0]


def test_the_own_schedule_copies_when_little_is_left() -> None:
    from sodfast.schedule import StepStatistics

    schedule = runpy.run_path(str(EXAMPLES / "own_schedule.py"))["OnAgreement"](share=0.5)
    actions = []
    for step, divergence in enumerate([0.1, 0.2, None, 0.11, 0.1, 0.3, 0.14], 1):
        metrics = {} if divergence is None else {"distill/divergence": divergence}
        decision = schedule.observe(StepStatistics(step, 0.5, 12.0, 20.0, metrics=metrics))
        actions.append(decision.action)
    assert actions == ["keep"] * 4 + ["copy", "keep", "copy"]
    assert schedule.state_dict() == {"highest": 0.0}


@pytest.mark.slow
def test_own_task(tiny_model: Path, tmp_path: Path) -> None:
    out = run("own_task.py", [f"model.path={tiny_model}", "out=run", *SMALL[:-2]], tmp_path)
    assert "mean reward of the test questions" in out
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_own_schedule(tiny_model: Path, tmp_path: Path) -> None:
    model = [f"model.path={tiny_model}", "task.train=48", "task.test=8", "out=run"]
    *_, said, again = run("own_schedule.py", [*model, *SMALL], tmp_path).splitlines()
    assert said.startswith("run: the teacher was replaced after the steps [")
    assert said.rpartition("[")[2] == again.rpartition("[")[2]


@pytest.mark.slow
def test_kernels_in_your_loop(tmp_path: Path) -> None:
    lines = run("kernels_in_your_loop.py", ["80"], tmp_path).splitlines()
    assert [line.split()[:2] for line in lines] == [["step", str(s)] for s in (1, 40, 80)]
    divergences = [float(line.split("divergence")[1].split()[0]) for line in lines]
    assert divergences[-1] < 0.75 * divergences[0]
