"""Run directories of earlier releases go on where they stopped.

data/runs_0.1.0.tar.gz holds two runs that release 0.1.0 made and ended at step 4, and what 0.1.0
itself wrote when it continued copies of them to step 8: CGTR on float32 weights, and an averaged
teacher on bfloat16 weights whose optimizer keeps 16 more bits (`optimizer.state=exact`, a key that
has another name today). Step 4 has an evaluation that was not due, which a continuation drops.
"""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from marks import slow

from sodfast.commands import build_trainer
from sodfast.config import load_config
from sodfast.config.layers import _say_once
from sodfast.run.console import Reporter
from sodfast.run.directory import stored_config

ARCHIVE = Path(__file__).parent / "data" / "runs_0.1.0.tar.gz"


def close(found: Any, expected: Any) -> bool:
    """Equal, but that numbers may differ by the rounding of another processor."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            close(found[key], value) for key, value in expected.items()
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    if isinstance(expected, float):
        return found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    return bool(found == expected)


@pytest.mark.parametrize("name", ["cgtr", *slow("ema_bf16")])
def test_a_run_of_0_1_0_goes_on(
    name: str, tmp_path: Path, read_run: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SODFAST_CACHE", str(tmp_path / "cache"))
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    run = tmp_path / name
    trainer = build_trainer(stored_config(run, ["steps=8"]), run, Reporter())
    try:
        assert trainer.step == 4
        trainer.train()
    finally:
        trainer.run.close()
    expected = json.loads((tmp_path / f"{name}.json").read_text())
    found = read_run(run)
    events = [e for e in expected["events"] if e["event"] not in ("resume", "checkpoint")]
    assert [line["step"] for line in found.lines] == list(range(9))
    assert not any(key.startswith("eval/") for key in found.lines[4])
    for line, one in zip(found.lines, expected["metrics"], strict=True):
        assert close(line, one), line["step"]
    assert close(found.events, events)
    assert close(found.summary, expected["summary"])


def test_a_renamed_key_is_accepted_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    _say_once.cache_clear()
    old = load_config("lab", ["model.dtype=bfloat16", "optimizer.state=exact"])
    assert old == load_config("lab", ["model.dtype=bfloat16", "optimizer.adamw=exact"])
    group = load_config("lab", ["model.dtype=bfloat16", "optimizer={state: exact}"])
    assert group.optimizer.adamw == "exact"
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "optimizer.state is now optimizer.adamw; the next release will not know its old name"
    ]


def test_a_renamed_key_in_a_file_gives_way_to_the_new_name_above_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: lab\nmodel: {dtype: bfloat16}\noptimizer: {state: fp32}\n")
    assert load_config(str(file), []).optimizer.adamw == "fp32"
    assert load_config(str(file), ["optimizer.adamw=exact"]).optimizer.adamw == "exact"
    above = tmp_path / "above.yaml"
    above.write_text("base: mine.yaml\noptimizer: {adamw: 8bit}\n")
    assert load_config(str(above), []).optimizer.adamw == "8bit"
