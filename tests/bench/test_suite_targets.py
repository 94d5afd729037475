"""Verdicts from results written by hand: met, missed, absent, not run."""

import json
from pathlib import Path
from typing import Any

import pytest
from suite_targets import DRAFTS_SHARE, EXTRA_BYTES, Target, judge, table

LIGER = ("Liger: fused_linear_jsd", "Liger: chunked_loss JSD")


def objective_case(ours: float, extra: float = 3e9) -> dict[str, Any]:
    """Rows of one case; times in ms with a floor of 100."""
    times = {
        "four products": 100.0,
        "ours": ours,
        "ours, top-20 + tail": 112.0,
        "ours, top-100 + tail": 112.0,
        "ours, frozen head": 80.0,
        "TRL: chunked divergence": 210.0,
        LIGER[0]: 250.0,
        LIGER[1]: 150.0,
        "fla: fused KL": 400.0,
    }
    rows = [
        {"name": name, "milliseconds": ms, "times_the_floor": ms / 100, "extra_bytes": extra}
        for name, ms in times.items()
    ]
    return {"rows": rows}


def write(folder: Path, part: str, cases: dict[str, Any], full: bool = True, **more: Any) -> None:
    found = {"versions": {"full_sizes": full}, "without": [], "cases": cases, "not_run": {}}
    found |= more
    (folder / f"{part}.json").write_text(json.dumps(found))


def whole_objective(folder: Path, without: tuple[str, ...] = (), **changed: Any) -> None:
    cases = {
        f"{rows} rows, {kind}": objective_case(113.0)
        for rows in (1024, 4096, 8192, 16_384)
        for kind in ("KL", "JSD")
    }
    write(folder, "objective", cases | changed, without=list(without))


def verdicts(folder: Path, *parts: str) -> dict[str, str]:
    found = judge(folder, list(parts))
    assert len({target.name for target in found}) == len(found)
    return {target.name: target.verdict for target in found}


def test_all_of_the_objective_is_met(tmp_path: Path) -> None:
    whole_objective(tmp_path)
    found = verdicts(tmp_path, "objective")
    assert set(found.values()) == {"pass"}
    # Six floors, memory, frozen head and TRL for both kinds, fla, and Liger at every size.
    assert len(found) == 2 * (3 + 1 + 1 + 1) + 1 + 4 * 2 * 2


@pytest.mark.parametrize(
    ("case", "missed"),
    [
        (objective_case(115.1), {"ours: times the floor"}),
        (objective_case(113.0, EXTRA_BYTES * 1.01), {"ours: extra bytes"}),
        (
            objective_case(151.0),
            {
                "ours: times the floor",
                "times as fast as TRL",
                "times as fast as Liger: chunked_loss JSD",
            },
        ),
    ],
)
def test_what_is_too_slow_or_too_large_is_a_miss(
    tmp_path: Path, case: dict[str, Any], missed: set[str]
) -> None:
    whole_objective(tmp_path, **{"8192 rows, JSD": case})
    found = verdicts(tmp_path, "objective")
    misses = {name for name, verdict in found.items() if verdict == "MISS"}
    assert misses == {f"8192 rows, JSD: {name}" for name in missed}


def test_a_peer_without_a_time_is_a_miss_unless_it_is_not_expected(tmp_path: Path) -> None:
    case = objective_case(113.0)
    for row in case["rows"]:
        if row["name"].startswith("TRL"):
            row.clear()
            reason = "ModuleNotFoundError: No module named 'trl'"
            row.update({"name": "TRL: chunked divergence", "failed": reason})
    whole_objective(tmp_path, **{"8192 rows, KL": case})
    name = "8192 rows, KL: times as fast as TRL"
    assert verdicts(tmp_path, "objective")[name] == "MISS"
    assert "No module named 'trl'" in table(judge(tmp_path, ["objective"]))
    whole_objective(tmp_path, ("trl",), **{"8192 rows, KL": case})
    assert verdicts(tmp_path, "objective")[name] == "skipped"


def test_an_absent_number_of_ours_is_never_excused(tmp_path: Path) -> None:
    failed = {"rows": [{"name": "ours", "failed": "OutOfMemoryError"}]}
    whole_objective(tmp_path, **{"1024 rows, KL": {"failed": "RuntimeError: lost"}})
    found = verdicts(tmp_path, "objective")
    assert found["1024 rows, KL"] == "MISS"
    assert found["1024 rows, KL: times as fast as Liger: fused_linear_jsd"] == "MISS"
    whole_objective(tmp_path, ("trl", "liger", "fla"), **{"8192 rows, KL": failed})
    found = verdicts(tmp_path, "objective")
    assert found["8192 rows, KL: ours: times the floor"] == "MISS"
    assert found["8192 rows, KL: ours, top-20 + tail: times the floor"] == "MISS"


def test_what_was_not_run_is_not_passed(tmp_path: Path) -> None:
    cases = {"8192 rows, KL": objective_case(113.0)}
    reason = "0.5 minutes left of the budget, it takes 1.3"
    write(tmp_path, "objective", cases, not_run={"8192 rows, JSD": reason})
    found = verdicts(tmp_path, "objective")
    assert found["8192 rows, JSD"] == "not run"
    assert found["8192 rows, JSD: ours: times the floor"] == "not run"
    assert found["8192 rows, KL: ours: times the floor"] == "pass"


def test_checks_of_cases_and_skipped_cases(tmp_path: Path) -> None:
    def row(value: float) -> dict[str, Any]:
        return {"check": "error", "value": value, "limit": 1.0, "at_most": True}

    cases = {
        "good": {"checks": [row(0.5)]},
        "bad": {"checks": [row(2.0)]},
        "unknown": {"checks": [row(float("nan"))]},
        "skipped": {"skipped": "needs two GPUs"},
        "accuracy, KL": {
            "checks": [],
            "rows": [
                {"name": "ours", "divergence": 1e-5, "d_head": 0.1},
                {
                    "name": "TRL: chunked divergence",
                    "divergence": 1e-5,
                    "failed": "ImportError: no",
                },
                {"name": LIGER[1], "divergence": 1e-5, "failed": "RuntimeError: no"},
                {"name": LIGER[1], "divergence": 1.0, "d_head": 0.1},
            ],
        },
    }
    write(tmp_path, "correctness", cases, without=["trl"])
    assert verdicts(tmp_path, "correctness") == {
        "good: error": "pass",
        "bad: error": "MISS",
        "unknown: error": "MISS",
        "skipped": "skipped",
        "accuracy, KL: TRL: chunked divergence at 1e-05": "skipped",
        "accuracy, KL: Liger: chunked_loss JSD at 1e-05": "MISS",
        "accuracy, KL: Liger: chunked_loss JSD at 1": "pass",
    }


def test_drafts_are_judged_by_the_best_of_what_there_is(tmp_path: Path) -> None:
    """Whichever command has run which case."""

    def judged(**milliseconds: float) -> Target:
        cases = {
            name.replace("_", " "): {"rows": [{"name": name, "milliseconds": taken}]}
            for name, taken in milliseconds.items()
        }
        asked = {"off", "3 drafts", "7 drafts"} - cases.keys()
        write(tmp_path, "8b_speculation", cases, not_run=dict.fromkeys(asked, "it ended before"))
        (found,) = (t for t in judge(tmp_path, ["8b_speculation"]) if t.limit == DRAFTS_SHARE)
        return found

    best = judged(off=10.0, **{"3_drafts": 8.0, "7_drafts": 6.0})
    assert (best.value, best.verdict) == (0.6, "pass")
    assert judged(off=10.0, **{"3_drafts": 8.0}).verdict == "MISS"
    for found in (judged(**{"3_drafts": 8.0}), judged(off=10.0)):
        assert (found.verdict, found.why) == ("not run", "it ended before")


def test_times_of_a_rehearsal_are_not_judged(tmp_path: Path) -> None:
    write(tmp_path, "objective", {"24 rows, KL": objective_case(1e6)}, full=False)
    assert verdicts(tmp_path, "objective") == {}


def test_shares_of_bandwidth_and_time_of_the_host(tmp_path: Path) -> None:
    row = {"share_of_copy_bandwidth": 0.7, "milliseconds": 2.0, "host_milliseconds": 0.4}
    logits = {"rows": [{"name": name, **row} for name in ("KL", "JSD")]}
    write(tmp_path, "logits", {"bfloat16": logits, "float32": logits})
    found = verdicts(tmp_path, "logits")
    assert found["bfloat16 logits, JSD: share of a copy"] == "pass"
    assert found["float32 logits, JSD: share of a copy"] == "MISS"
    assert found["bfloat16 logits, KL: share of a copy"] == "MISS"
    assert found["bfloat16 logits, top-20 + tail: share of a copy"] == "MISS"  # no such row

    names = ("copy", "average", "adamw 8bit", "adamw fp32", "adamw exact")
    host = {"rows": [{"name": name, **row} for name in names]}
    group = {"rows": [*host["rows"], {"name": "torchao: AdamW8bit (no norm)", "milliseconds": 3.0}]}
    groups = ("teacher", "AdamW, 8-bit moments", "AdamW, wider moments")
    write(tmp_path, "parameters", {"host": host, **dict.fromkeys(groups, group)})
    found = verdicts(tmp_path, "parameters")
    assert found["adamw 8bit: share of a copy"] == "pass"
    assert found["copy: share of a copy"] == "MISS"
    assert found["copy, 399 tensors: host milliseconds"] == "pass"
    assert found["adamw 8bit: times as fast as torchao"] == "pass"


def test_the_table_begins_with_what_is_missed() -> None:
    targets = [
        Target("p", "good", 1.0, 2.0),
        Target("p", "later", None, 2.0, why="no time", absent="not run"),
        Target("p", "bad", 1.0, 2.0, at_most=False),
        Target("p", "gone", None, 2.0, why="a | b"),
    ]
    lines = table(targets).splitlines()[2:]
    assert [line.split(" | ")[2] for line in lines] == ["bad", "gone", "later", "good"]
    assert lines[0] == "| MISS | p | bad | 1 | ≥ 2 |"
    assert lines[1] == "| MISS | p | gone | a / b | ≤ 2 |"
