"""The user's own Python: found, listed with what it imports, loaded as it is now."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sodfast.errors import UsageError
from sodfast.source import describe_error, find_source


@pytest.fixture(autouse=True)
def _imports_are_undone() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def refusal(text: str) -> str:
    with pytest.raises(UsageError) as error:
        find_source(text).load()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_is_loaded_as_it_is_now_with_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "own_task.py").write_text("from own_helper import value\n")
    (tmp_path / "own_helper.py").write_text("value = 1\n")
    source = f"{tmp_path / 'own_task.py'}:value"
    assert find_source(source).load() == 1
    (tmp_path / "own_helper.py").write_text("value = 2\n")
    assert find_source(source).load() == 2
    assert not list(tmp_path.rglob("*.pyc")), "nothing is written beside the user's files"


def test_files_of_the_same_names_in_two_folders(tmp_path: Path) -> None:
    for name in ("one", "two", "one"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "own_task.py").write_text("from own_helper import value\n")
        (folder / "own_helper.py").write_text(f"value = {name!r}\n")
        assert find_source(f"{folder / 'own_task.py'}:value").load() == name


def test_a_module_is_searched_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "own_package" / "inner"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    (package / "rewards.py").write_text("from ..shared import score\nfrom . import text\n")
    (package / "text.py").write_text("")
    (package.parent / "shared.py").write_text("score = 3\n")
    monkeypatch.chdir(tmp_path)
    source = find_source("own_package.inner.rewards:score")
    assert source.load() == 3
    assert [file.relative_to(tmp_path).as_posix() for file in source.files()] == [
        "own_package/__init__.py",
        "own_package/inner/__init__.py",
        "own_package/inner/rewards.py",
        "own_package/inner/text.py",
        "own_package/shared.py",
    ]


def test_of_installed_modules_only_the_own_package_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "own_installed.py").write_text("import other_installed\nvalue = 1\n")
    (installed / "other_installed.py").write_text("")
    monkeypatch.syspath_prepend(installed)
    assert [file.name for file in find_source("own_installed:value").files()] == [
        "own_installed.py"
    ]


def test_what_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    file = tmp_path / "own_task.py"
    assert refusal(f"{file}:Task") == f"task.source: there is no file {file}"
    assert refusal("no_such_module:Task").startswith("task.source: there is no module no_such")
    assert "ModuleNotFoundError" in refusal("no_such_package.module:Task")
    file.write_text("def reward(): ...\n")
    assert refusal(f"{file}:Task") == f"task.source: {file} has no 'Task' (it has reward)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nraise ValueError('not\\nthis way')\n", "own_task.py:2: ValueError: not this way"),
        ("import no_such_module\n", "own_task.py:1: ModuleNotFoundError: No module named"),
        ("x = (\n", "own_task.py:1: SyntaxError: '(' was never closed"),
        ("import sys\nsys.exit()\n", "own_task.py:2: SystemExit"),
    ],
)
def test_a_module_that_cannot_be_imported(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own_task.py").write_text(text)
    assert f"task.source: {tmp_path}/{message}" in refusal(f"{tmp_path / 'own_task.py'}:Task")


def test_a_name_that_python_has_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("Task = 1\n")
    assert "a module named json is imported already: rename" in refusal(
        f"{tmp_path / 'json.py'}:Task"
    )


def test_an_error_is_placed_at_the_users_last_line(tmp_path: Path) -> None:
    file = tmp_path / "own_task.py"
    file.write_text("import json\ndef f():\n    return json.loads('{')\n")
    call = find_source(f"{file}:f").load()
    with pytest.raises(ValueError) as error:
        call()
    assert describe_error(error.value, [file]).startswith(f"{file}:3: JSONDecodeError: Expecting")
