"""A stand-in for training, a few lines that write what a run writes: a trial takes a moment."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

# Takes the place of `sodfast train` in a trial's process. `log.project` says what happens to it:
# "crash N": its first N processes die after step 2; "usage": it refuses its arguments; "slow":
# its first process ends only when it is told to; "pace": a step takes a while. A step is a line of
# metrics.jsonl, kept whatever ends the process.
STAND_IN = """
import os, sys

if "SODFAST_LEASH" in os.environ:
    import fcntl, json, time, types
    from pathlib import Path
    from sodfast.config import load_config
    from sodfast.errors import UsageError
    from sodfast.files import replace_text

    def stored_config(run, overrides):
        return load_config(str(run / "config.yaml"), overrides)

    def train_run(config, resume):
        run = resume or Path(config.out)
        if resume is None and run.exists() and os.listdir(run):
            raise UsageError("the directory is not empty")
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where two run at once
        with (run / "starts").open("a") as starts:
            print(os.environ["OMP_NUM_THREADS"], file=starts)
        replace_text(run / "config.yaml", config.to_yaml())
        metrics = run / "metrics.jsonl"
        done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        starts = len((run / "starts").read_text().splitlines())
        what, _, count = config.log.project.partition(" ")

        def summary(status, steps):
            text = json.dumps({"status": status, "steps": steps})
            (run / "summary.json").write_text(text)

        if what == "usage":
            raise UsageError("these arguments cannot be used")
        try:
            for step in range(done, config.steps + 1):
                line = {"step": step, "reward/mean": 0.5, "eval/mean@16": step / 8}
                with metrics.open("a") as stream:
                    print(json.dumps(line), file=stream)
                if what == "crash" and step == 2 + starts - 1 and starts <= int(count):
                    print("it crashed", flush=True)
                    os.abort()
                if what == "pace":
                    time.sleep(0.2)
                while what == "slow" and step == 3 and starts == 1:
                    time.sleep(0.02)
        except KeyboardInterrupt:
            (run / "saved").open("a").write("saved\\n")
            time.sleep(0.3)  # a second signal would end this with a traceback
            summary("interrupted", step)
            sys.exit(130)
        summary("done", config.steps)

    def train_fork(source, overrides):
        # What it has before the fork is as its source left it.
        assert (source / "summary.json").is_file(), "the source has not ended"
        out = Path(json.loads(overrides[-1].removeprefix("out=")))
        out.mkdir(parents=True)
        values = dict(text.split("=", 1) for text in overrides)
        kept = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
        (out / "metrics.jsonl").write_text("".join(kept[: int(values["step"]) + 1]))
        own = [text for text in overrides if not text.startswith(("step=", "teacher.refresh="))]
        train_run(stored_config(source, own), out)

    session = types.ModuleType("sodfast.commands")
    session.train_run, session.train_fork = train_run, train_fork
    rundir = types.ModuleType("sodfast.run.directory")
    rundir.stored_config = stored_config
    sys.modules |= {"sodfast.commands": session, "sodfast.run.directory": rundir}
"""

Write = Callable[..., Path]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """`stand_in(seed=[0, 1])` writes a study of stand-ins with these axes and returns its path;
    `fork` is that section."""
    folder = tmp_path / "stand-in"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(STAND_IN)
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *([path] if path else [])]))

    def write(fork: dict[str, Any] | None = None, **axes: list[Any]) -> Path:
        file = tmp_path / "study.yaml"
        axes = {"log.project" if key == "project" else key: value for key, value in axes.items()}
        overrides = {"device": "cpu", **({} if fork else {"steps": 5})}
        study = {"base": "lab", "overrides": overrides, "axes": axes, "fork": fork}
        file.write_text(yaml.safe_dump({key: value for key, value in study.items() if value}))
        return file

    return write
