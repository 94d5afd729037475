"""Another schedule on a recorded run: exact where nothing changed, marked where something did."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from marks import slow

from sodfast.errors import UsageError
from sodfast.report.replay import Replay, replay_run

OPEN_GATES = [
    "schedule.min_isolation=2",
    "schedule.check_every=2",
    "schedule.window=2",
    "schedule.reward_margin=0.0",
]


@pytest.fixture(scope="session")
def cgtr_run(train: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose gates are checked at steps 2, 4 and 6. To look at, not to touch."""
    out = tmp_path_factory.mktemp("replay") / "run"
    train(out, *OPEN_GATES)
    return out


@pytest.fixture
def copy(cgtr_run: Path, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    shutil.copytree(cgtr_run, out)
    return out


def gates_of(events: list[dict[str, Any]]) -> dict[int, Any]:
    return {e["step"]: (e["gates"], e["refresh"]) for e in events if e["event"] == "gate"}


def replayed_gates(result: Replay) -> dict[int, Any]:
    return {
        step: (decision.gates, decision.action == "copy")
        for step, decision in enumerate(result.decisions, start=1)
        if decision.gates is not None
    }


# ---------------------------------------------------------------- unchanged


def test_unchanged_values_reproduce_the_record_exactly(
    cgtr_run: Path, read_run: Callable[[Path], Any]
) -> None:
    recorded = read_run(cgtr_run)
    result = replay_run(cgtr_run, [])
    assert replayed_gates(result) == gates_of(recorded.events)
    assert result.refreshes == result.recorded_refreshes == recorded.summary["refresh_steps"]
    assert result.first_difference is None
    for line, decision in zip(recorded.lines[1:], result.decisions, strict=True):
        assert line["teacher/age"] == decision.age
        assert {key: line[key] for key in decision.metrics} == decision.metrics
    text = "\n".join(result.text())
    assert "Every decision is the recorded one." in text and "COUNTERFACTUAL" not in text


@pytest.mark.parametrize(
    "schedule",
    [
        *slow(
            ["schedule.kind=hard", "schedule.every=2"],
            ["schedule.kind=ema"],
            ["schedule.kind=trust_region"],
        ),
        [*OPEN_GATES, "schedule.length_unit=shard", "schedule.shards=2"],
    ],
)
def test_every_kind_reproduces_itself(
    train: Callable[..., Any], tmp_path: Path, schedule: list[str]
) -> None:
    recorded = train(tmp_path / "run", "steps=4", *schedule)
    result = replay_run(tmp_path / "run", [])
    assert result.first_difference is None
    assert result.refreshes == recorded.summary["refresh_steps"]
    assert replayed_gates(result) == gates_of(recorded.events)


# ---------------------------------------------------------------- counterfactual

# Checks at 5 and 10. Rewards rise, so the reward gate opens; the tail is 30 / 10 = 3.
CONFIG = """\
schedule: {kind: cgtr, min_isolation: 10, check_every: 5, window: 2, reward_margin: 0.05}
"""


def write_run(path: Path, refreshed: int | None = 10, config: str = CONFIG) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(config)
    lines: list[dict[str, Any]] = [{"step": 0, "eval/mean@16": 0.4}]
    lines += [
        {
            "step": step,
            "reward/mean": step / 20,
            "length/mean": 10.0,
            "length/max": 30,
            "teacher/refreshed": int(step == refreshed),
        }
        for step in range(1, 13)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_other_gate_values_by_hand(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    result = replay_run(run, ["schedule.min_isolation=5"])
    assert (result.refreshes, result.recorded_refreshes) == ([5, 10], [10])
    assert result.first_difference == 5
    assert result.blocked == {"isolation": 0, "reward": 0, "length": 0}
    result = replay_run(run, ["schedule.max_tail_ratio=2.9"])
    assert (result.refreshes, result.first_difference) == ([], 10)
    # Isolation blocks at step 5 only, the tail at both checks.
    assert result.blocked == {"isolation": 1, "reward": 0, "length": 2}
    # A gate that is off blocks nothing and is not counted.
    result = replay_run(run, ["schedule.gates=[reward]"])
    assert (result.refreshes, result.blocked) == ([5, 10], {"reward": 0})


def test_the_text_shows_both_and_says_where_they_part(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = list(replay_run(run, ["schedule.min_isolation=5"]).text())
    (caveat,) = [line for line in lines if "COUNTERFACTUAL" in line]
    assert "part after step 5" in caveat and "from step 6 on" in caveat
    (five,) = [line.split() for line in lines if line.split()[:1] == ["5"]]
    (ten,) = [line.split() for line in lines if line.split()[:1] == ["10"]]
    assert five[1:3] == ["refresh", "-"] and ten[1:3] == ["refresh", "refresh"]
    assert "isolation 5/5 pass" in " ".join(five)
    assert "replay: refreshes at 5, 10" in lines and "recorded: refreshes at 10" in lines
    (blocked,) = [line for line in replay_run(run, []).text() if line.split()[:1] == ["5"]]
    assert "isolation 5/10 BLOCK" in blocked


@pytest.mark.parametrize(
    ("overrides", "refreshes", "first"),
    [
        (["schedule.kind=hard", "schedule.every=4"], [4, 8, 12], 4),
        (["schedule.kind=fixed"], [], 10),
        (["schedule.kind=ema"], [], 1),
        (["schedule.kind=trust_region"], [], 1),
        (["schedule.max_tail_ratio=4"], [10], None),  # other values, the same decisions
    ],
)
def test_other_kinds(
    tmp_path: Path, overrides: list[str], refreshes: list[int], first: int | None
) -> None:
    result = replay_run(write_run(tmp_path / "run"), overrides)
    assert (result.refreshes, result.first_difference) == (refreshes, first)


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    assert len(replay_run(run, []).decisions) == 11


# ---------------------------------------------------------------- refusals


def refused(run: Path, *overrides: str) -> str:
    with pytest.raises(UsageError) as error:
        replay_run(run, list(overrides))
    return str(error.value)


def test_what_is_no_run_is_refused(tmp_path: Path, copy: Path) -> None:
    assert "config.yaml" in refused(tmp_path / "nowhere")
    (copy / "metrics.jsonl").write_text('{"step": 0}\n')
    assert "no training step" in refused(copy)
    (copy / "metrics.jsonl").unlink()
    assert "does not exist" in refused(copy)


def test_overrides_of_anything_else_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "seed=3" in refused(run, "seed=3")
    assert "scheduler.kind=ema" in refused(run, "scheduler.kind=ema")
    assert "schedule.evry" in refused(run, "schedule.kind=hard", "schedule.evry=3")


def test_metrics_that_lack_something_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "shards" in refused(run, "schedule.length_unit=shard")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:4] + lines[5:]))
    assert "step 4 is missing" in refused(run)
    (run / "metrics.jsonl").write_text("".join(lines).replace('"length/max": 30, ', "", 1))
    assert "step 1 has no length/max" in refused(run)


def test_other_shards_than_the_recorded_are_refused(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    train(tmp_path / "run", "steps=1", "schedule.length_unit=shard", "schedule.shards=2")
    assert "4 shards" in refused(tmp_path / "run", "schedule.shards=4")
    assert replay_run(tmp_path / "run", ["schedule.length_unit=sequence"]).refreshes == []


def test_a_record_that_contradicts_its_configuration_is_refused(tmp_path: Path) -> None:
    message = refused(write_run(tmp_path / "run", refreshed=5))
    assert "[10]" in message and "[5]" in message


# ---------------------------------------------------------------- the command


def test_the_command_ends_with_json_and_writes_nothing(copy: Path, cli: Callable[..., Any]) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    code, out, err = cli("replay", str(copy), "schedule.kind=hard", "schedule.every=3")
    assert (code, err) == (0, "")
    result = json.loads(out.splitlines()[-1])
    assert result["refreshes"] == [3, 6] and result["schedule"] == {"kind": "hard", "every": 3}
    assert result["recorded_schedule"]["kind"] == "cgtr" and result["steps"] == 6
    code, out, err = cli("replay", str(copy), "seed=1")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("sodfast: ")
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
