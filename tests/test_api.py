"""A run from Python: whole, step by step, continued, and looked into."""

import threading
from pathlib import Path
from typing import Any

import pytest

import sodfast
from sodfast.errors import UsageError
from sodfast.files import read_lines


def overrides(tiny_run: list[str], out: Path) -> list[str]:
    return [*tiny_run, f"out={out}"]


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines
    ]


@pytest.mark.slow
def test_a_notebook(tiny_run: list[str], tmp_path: Path) -> None:
    """Train five steps, look at metrics and events, go on: the run of the command line."""
    hard = {"kind": "hard", "every": 2}
    values: dict[str, Any] = {"steps": 5, "schedule": hard}
    run = sodfast.train("lab", overrides(tiny_run, tmp_path / "run"), **values)
    assert run.path == tmp_path / "run" and run.config.schedule.model_dump() == hard
    assert [line["step"] for line in run.metrics] == [0, 1, 2, 3, 4, 5]
    assert [e["step"] for e in run.events if e["event"] == "refresh"] == [2, 4]
    assert run.summary is not None and run.summary["status"] == "done"
    longer = sodfast.train(resume=run.path, steps=6)
    assert untimed(sodfast.load_run(tmp_path / "run").metrics)[:4] == untimed(run.metrics)[:4]
    assert longer.metrics[-1]["step"] == 6


@pytest.mark.slow
def test_what_a_notebook_shows_of_a_run(tiny_run: list[str], tmp_path: Path) -> None:
    """A curve of the metrics, and one answer's divergences over the words that they belong to."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    run = sodfast.train("lab", overrides(tiny_run, tmp_path / "run"), steps=5, eval={"every": 5})
    steps = [line["step"] for line in run.metrics[1:]]
    rewards = [line["reward/mean"] for line in run.metrics[1:]]
    sample = next(one for one in run.samples(5) if one["hint"])
    assert len(sample["divergence"]) == len(sample["text"]) == sample["length"]
    figure, (curve, bars) = pyplot.subplots(1, 2)
    curve.plot(steps, rewards)
    bars.bar(range(sample["length"]), sample["divergence"], tick_label=sample["text"])
    figure.savefig(tmp_path / "run.png")
    pyplot.close(figure)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert steps == [1, 2, 3, 4, 5] and curve.lines[0].get_ydata().tolist() == rewards


def test_the_samples_of_a_step(tiny_run: list[str], tmp_path: Path) -> None:
    run = sodfast.train("lab", overrides(tiny_run, tmp_path / "run"), steps=2, eval={"every": 2})
    rewards = [sample["reward"] for sample in run.samples(2)]
    assert len(rewards) == 16
    assert sum(rewards) / 16 == pytest.approx(run.metrics[2]["reward/mean"])


@pytest.mark.slow
def test_step_by_step_is_the_same_run(tiny_run: list[str], tmp_path: Path) -> None:
    whole = sodfast.train("lab", overrides(tiny_run, tmp_path / "whole"))
    config = sodfast.load_config("lab", overrides(tiny_run, tmp_path / "steps"))
    with sodfast.Trainer.build(config) as trainer:
        first = trainer.step()
        assert first["step"] == 1 and trainer.run.summary is None
        assert trainer.run.metrics == read_lines(trainer.run.path / "metrics.jsonl")
        with pytest.raises(UsageError, match="being written by another process"):
            sodfast.Trainer.resume(trainer.run.path)
        trainer.step()
    assert trainer.run.summary is not None and trainer.run.summary["status"] == "interrupted"
    with pytest.raises(UsageError, match="is closed"):
        trainer.step()

    trainer = sodfast.Trainer.resume(trainer.run.path)
    assert trainer.algorithm.step == 2  # saved when it was left, though no checkpoint was due
    lines = []
    while not trainer.finished:
        lines.append(trainer.step())
    with pytest.raises(UsageError, match="is finished at step 6"):
        trainer.step()
    trainer.close()
    assert [line["step"] for line in lines] == [3, 4, 5, 6]
    assert untimed(trainer.run.metrics) == untimed(whole.metrics)
    assert trainer.run.summary == whole.summary


def test_ctrl_c_saves_the_last_finished_step(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sodfast.errors import Interrupted

    config = sodfast.load_config("lab", overrides(tiny_run, tmp_path / "run"))
    trainer = sodfast.Trainer.build(config)
    trainer.step()

    def interrupted(*arguments: Any, **keywords: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(trainer.algorithm.engine, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.step()
    with sodfast.Trainer.resume(tmp_path / "run") as trainer:
        assert trainer.algorithm.step == 1


def test_a_run_in_a_thread_takes_no_signals(tiny_run: list[str], tmp_path: Path) -> None:
    arguments = ("lab", [*overrides(tiny_run, tmp_path / "run"), "steps=1"])
    thread = threading.Thread(target=sodfast.train, args=arguments)
    thread.start()
    thread.join()
    assert sodfast.load_run(tmp_path / "run").summary is not None


def test_what_cannot_be_opened_or_resumed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run directory"):
        sodfast.load_run(tmp_path)
    for arguments in ({"source": "lab"}, {"seed": 3}):
        with pytest.raises(UsageError, match="resume takes only steps"):
            sodfast.train(resume=tmp_path, **arguments)
    with pytest.raises(UsageError, match="did you mean steps"):
        sodfast.train("lab", stepps=3)


# ---------------------------------------------------------------- a schedule of one's own

PLATEAU = Path(__file__).parent.parent / "examples" / "plateau_schedule.py"


@pytest.mark.slow
def test_an_own_schedule_resumes_exactly_and_refuses_to_after_an_edit(
    tiny_run: list[str], tmp_path: Path, cli: Any
) -> None:
    file = tmp_path / "own.py"
    file.write_text(PLATEAU.read_text())
    schedule = {"kind": "python", "source": f"{file}:OnPlateau", "options": {"patience": 2}}
    values: dict[str, Any] = {"schedule": schedule, "checkpoint": {"every": 2, "keep": 9}}
    whole = sodfast.train("lab", overrides(tiny_run, tmp_path / "whole"), **values)
    refreshed = [line["step"] for line in whole.metrics[1:] if line["teacher/refreshed"]]
    assert refreshed  # and it is seen to do what it says
    waited = [line["schedule/waited"] for line in whole.metrics[1:]]
    assert [step for step in range(1, 7) if waited[step - 1] == 2] == refreshed

    config = sodfast.load_config("lab", overrides(tiny_run, tmp_path / "cut"), **values)
    for last in (1, 4, 6):
        path = tmp_path / "cut"
        trainer = sodfast.Trainer.resume(path) if last > 1 else sodfast.Trainer.build(config)
        with trainer:
            while trainer.algorithm.step < last:
                trainer.step()
    assert untimed(trainer.run.metrics) == untimed(whole.metrics)

    replayed = cli("replay", str(whole.path))
    assert replayed.code == 0 and "Every decision is the recorded one" in replayed.out
    forked = cli("fork", str(whole.path), "step=4", f"out={tmp_path / 'fork'}")
    assert forked.code == 0, forked.err
    assert untimed(sodfast.load_run(tmp_path / "fork").metrics) == untimed(whole.metrics)

    file.write_text(file.read_text() + "\n# edited\n")
    refused = cli("train", "--resume", str(whole.path), "steps=7")
    assert refused.code == 2
    assert refused.err.startswith(f"sodfast: {file} is not as it was when the run began")


@pytest.mark.slow
def test_a_run_whose_schedule_failed_goes_on_as_a_fork_with_the_mended_one(
    tiny_run: list[str], tmp_path: Path, cli: Any
) -> None:
    """From the last checkpoint: the student has moved before a schedule is asked."""
    own = PLATEAU.read_text()
    (tmp_path / "own.py").write_text(
        own.replace("        reward =", "        1 / (5 - statistics.step)\n        reward =", 1)
    )
    (tmp_path / "mended.py").write_text(own)
    assert "1 / (5" in (tmp_path / "own.py").read_text()
    keys = ["schedule.kind=python", f"schedule.source={tmp_path / 'own.py'}:OnPlateau"]
    failed = cli("train", "lab", *overrides(tiny_run, tmp_path / "run"), *keys)
    assert failed.code == 1 and "sodfast: step 5: " in failed.err
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())[-1] == "step-3"
    mended = f"schedule.source={tmp_path / 'mended.py'}:OnPlateau"
    forked = cli("fork", str(tmp_path / "run"), "step=3", f"out={tmp_path / 'fork'}", mended)
    assert forked.code == 0, forked.err
    whole = ["schedule.kind=python", mended, f"out={tmp_path / 'whole'}"]
    assert cli("train", "lab", *tiny_run, *whole).code == 0
    found, expected = (sodfast.load_run(tmp_path / name).metrics for name in ("fork", "whole"))
    assert untimed(found) == untimed(expected)


def test_a_schedule_that_fails_ends_the_run_in_one_line(
    tiny_run: list[str], tmp_path: Path, cli: Any
) -> None:
    file = tmp_path / "own.py"
    file.write_text(PLATEAU.read_text().replace("self.waited = 0 if", "self.waited = 1 / 0 if"))
    keys = [f"schedule.source={file}:OnPlateau", "schedule.kind=python"]
    failed = cli("train", "lab", *overrides(tiny_run, tmp_path / "run"), *keys)
    line = (
        PLATEAU.read_text()
        .splitlines()
        .index("        self.waited = 0 if reward > self.best else self.waited + 1")
    )
    assert failed.code == 1
    assert f"step 1: {file}:{line + 1}: ZeroDivisionError" in failed.err
    missing = f"schedule.source={tmp_path / 'none.py'}:OnPlateau"
    refused = cli("train", "lab", *overrides(tiny_run, tmp_path / "no"), keys[1], missing)
    assert refused.code == 2 and "schedule.source: there is no file" in refused.err
    assert not (tmp_path / "no").exists()
