"""The Ray launcher on a real Ray: the tables of a local sweep, also when a worker is killed."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sodfast.errors import UsageError
from sodfast.study import launch_ray
from sodfast.study.directory import lock_path, log_path, open_study, run_path, write_table
from sodfast.study.sweep import sweep


@pytest.fixture
def study(tmp_path: Path, tiny_run: list[str]) -> Path:
    path = tmp_path / "study.yaml"
    overrides = dict(text.split("=", 1) for text in [*tiny_run, "device=cpu", "checkpoint.every=2"])
    axes = {"schedule": [{"kind": "ema", "rate": 0.3}, {"kind": "hard", "every": 2}]}
    text = "".join(f"  {key}: {value}\n" for key, value in {**overrides, "steps": 60}.items())
    path.write_text(f"base: lab\noverrides:\n{text}axes: {json.dumps(axes)}\n")
    return path


def test_without_ray_the_launcher_says_what_to_install(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_ray, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'sodfast\[ray\]'"):
        sweep(str(study), [f"out={tmp_path / 'out'}"], launcher="ray")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere.invalid:6379", "auto", "nobody"]
)
def test_an_address_of_nobody_is_refused_at_once(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address == "auto":  # which would find a cluster of another test, or of the machine
        monkeypatch.setattr("ray._private.services.find_gcs_addresses", cache(set))
    if "invalid" in address:  # a nameserver may take longer to say so

        def unknown(*_: Any, **others: Any) -> Any:
            raise socket.gaierror("Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
    began = time.monotonic()
    with pytest.raises(UsageError) as caught:
        sweep(str(study), [f"out={tmp_path / 'out'}"], launcher="ray", address=address)
    assert time.monotonic() - began < 10
    assert str(caught.value).startswith(f"--address {address}: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_a_killed_worker_is_retried_and_the_table_is_a_local_sweeps(
    study: Path, tmp_path: Path, train: Any
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sodfast", "sweep", str(study), f"out={out}"]
    process = subprocess.Popen(
        [*command, "--launcher", "ray"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        victim = "hard-every2"
        metrics = run_path(out, victim) / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        trial = int(lock_path(out, victim).read_text())
        worker = parent(trial)
        assert worker not in (os.getpid(), process.pid)  # a worker of Ray, not the driver
        os.kill(worker, signal.SIGKILL)
        output, _ = process.communicate(timeout=300)
    finally:
        process.terminate()
        process.wait()
    assert process.returncode == 0, output
    log = log_path(out, victim).read_text()
    assert log.count("$ sodfast train") == 2 and "--resume" in log
    assert log.count("step 1/60") == 1  # it went on, it did not start over
    assert not (out / "logs" / f"{victim}.failed").exists()

    expected = tmp_path / "expected"
    (expected / "logs").mkdir(parents=True)
    for name in ("study.yaml", "base.yaml"):
        (expected / name).write_text((out / name).read_text())
    for undisturbed in open_study(expected).trials:
        overrides = [text for text in undisturbed.overrides if not text.startswith("out=")]
        train(run_path(expected, undisturbed.name), *overrides)
    assert (out / "table.csv").read_text() == write_table(expected).read_text()
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert [row["steps"] for row in rows] == ["60", "60"]
    assert {row["status"] for row in rows} <= {"done", "collapsed"}
