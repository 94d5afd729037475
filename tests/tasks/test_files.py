"""Hashes of whatever a task is read from."""

import hashlib
from pathlib import Path

from sodfast.config import ArithmeticConfig, PythonConfig, ToolUseConfig
from sodfast.tasks.files import changed_file, file_hashes


def test_a_generated_task_and_hub_ids_have_no_files() -> None:
    assert file_hashes(ArithmeticConfig()) == {}
    assert file_hashes(ToolUseConfig(train="org/name", test="org/other")) == {}


def test_rows_the_source_and_what_it_imports_beside_it(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import math, helper\n")
    (tmp_path / "helper.py").write_text("from data import names\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("")
    (tmp_path / "data" / "names.py").write_text("")
    (tmp_path / "unused.py").write_text("")
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.parquet").write_bytes(b"a")
    (tmp_path / "test.jsonl").write_bytes(b"b")
    config = PythonConfig(
        source=f"{tmp_path / 'own.py'}:reward", train=str(folder), test=str(tmp_path / "test.jsonl")
    )
    hashes = file_hashes(config)
    assert sorted(Path(name).relative_to(tmp_path).as_posix() for name in hashes) == [
        "data/__init__.py",
        "data/names.py",
        "helper.py",
        "own.py",
        "rows/a.parquet",
        "test.jsonl",
    ]
    assert hashes[str(tmp_path / "test.jsonl")] == hashlib.sha256(b"b").hexdigest()


def test_a_changed_a_new_and_a_missing_file_are_named() -> None:
    assert changed_file({"a": "1"}, {"a": "1"}) is None
    assert changed_file({"a": "1", "b": "2"}, {"a": "1", "b": "3"}) == "b"
    assert changed_file({"a": "1"}, {}) == "a"
    assert changed_file({}, {"a": "1"}) == "a"
