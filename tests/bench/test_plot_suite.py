"""The plots show what the JSON holds, and the same JSON gives the same bytes."""

import json
from pathlib import Path
from typing import Any

import plot_suite
import pytest


def write(folder: Path, part: str, cases: dict[str, Any]) -> None:
    (folder / f"{part}.json").write_text(json.dumps({"cases": cases}))


def results(folder: Path) -> None:
    rows = [
        {"name": name, "divergence": divergence, "d_head": error}
        for name, error in (("ours", 2e-3), ("Liger: chunked_loss JSD", 0.3))
        for divergence in (1e-1, 1e-5, 1e-3)
    ]
    rows.append({"name": "TRL: chunked divergence", "divergence": 1e-3, "failed": "no module"})
    write(folder, "correctness", {"accuracy, KL": {"rows": rows}, "fp16": {"checks": []}})
    cases = {
        f"{count} rows, {kind}": {
            "rows": [
                {"name": "ours", "rows": count, "milliseconds": count / 100},
                {"name": "eager", "rows": count, "failed": "OutOfMemoryError"},
            ]
        }
        for count in (8192, 1024)
        for kind in ("KL", "JSD")
    }
    write(folder, "objective", {"ceilings": {}, **cases})


def test_points_are_those_of_the_json_in_order(tmp_path: Path) -> None:
    results(tmp_path)
    found = plot_suite.accuracy(tmp_path, "KL")
    assert found == {
        "ours": [(1e-5, 2e-3), (1e-3, 2e-3), (1e-1, 2e-3)],
        "Liger: chunked_loss JSD": [(1e-5, 0.3), (1e-3, 0.3), (1e-1, 0.3)],
    }
    assert plot_suite.accuracy(tmp_path, "JSD") == {}
    assert plot_suite.times(tmp_path, "JSD") == {"ours": [(1024, 10.24), (8192, 81.92)]}


@pytest.mark.slow
def test_files_are_drawn_and_drawn_alike(tmp_path: Path) -> None:
    results(tmp_path)
    files = plot_suite.draw(tmp_path)
    names = ["accuracy.png", "accuracy.svg", "times.png", "times.svg"]
    assert sorted(file.name for file in files) == names
    before = {file: file.read_bytes() for file in files}
    assert b"Liger: chunked_loss JSD" in before[tmp_path / "accuracy.svg"]
    plot_suite.draw(tmp_path)
    assert {file: file.read_bytes() for file in files} == before


def test_nothing_to_draw_is_no_file(tmp_path: Path) -> None:
    write(tmp_path, "objective", {"ceilings": {}, "8192 rows, KL": {"failed": "lost"}})
    assert plot_suite.draw(tmp_path) == [] and not list(tmp_path.glob("*.svg"))
