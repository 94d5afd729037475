"""The user's own Python: found, listed with what it imports, loaded as it is now."""

import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from sodfast.errors import Interrupted, RunFailed, UsageError
from sodfast.source import describe_error, find_source, time_limit


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


def test_two_sources_have_their_own_modules_whenever_they_run(tmp_path: Path) -> None:
    """Of what a call imports, and of what pickle looks up by its name."""
    text = """
import pickle

def ask():
    from own_helper import value
    return value, pickle.loads(pickle.dumps(ask)) is ask
"""
    sources = {}
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"own_{name}.py").write_text(text)
        (folder / "own_helper.py").write_text(f"value = {name!r}\n")
        sources[name] = find_source(f"{folder / f'own_{name}.py'}:ask")
    calls = {name: source.load() for name, source in sources.items()}
    for name in ("one", "two", "one"):
        with sources[name].running(sources[name].unusable):
            assert calls[name]() == (name, True)


def test_a_script_that_names_itself_stays_the_main_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = types.ModuleType("__main__")
    script.__file__ = str(tmp_path / "own_script.py")
    (tmp_path / "own_script.py").write_text("value = 1\n")
    monkeypatch.setitem(sys.modules, "__main__", script)
    assert find_source(f"{script.__file__}:value").load() == 1
    assert sys.modules["__main__"] is script


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


# ---------------------------------------------------------------- calls


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise GeneratorExit", "GeneratorExit"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import asyncio\nraise asyncio.CancelledError", "CancelledError"),
        ("class E(Exception):\n    def __str__(self): 1 / 0\nraise E", "E"),
    ],
)
def test_whatever_the_users_code_raises_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "own.py").write_text(text)
    last = text.count("\n") + 1
    assert refusal(f"{tmp_path}/own.py:x") == f"task.source: {tmp_path}/own.py:{last}: {said}"


@pytest.mark.parametrize(
    "error", [UsageError("a"), RunFailed("b"), Interrupted(), KeyboardInterrupt()]
)
def test_errors_that_are_ours_and_interruptions_pass(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "own.py").write_text("x = 1\n")
    source = find_source(f"{tmp_path}/own.py:x")
    with pytest.raises(type(error)) as raised, source.running(source.unusable):
        raise error
    assert raised.value is error


def test_the_users_code_changes_no_place_that_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose `out` is relative would go on elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "own.py").write_text(
        "import os, sys\nos.chdir('elsewhere')\nsys.stdout = x = None\n"
    )
    streams = sys.stdout, sys.stderr
    assert find_source("own.py:x").load() is None
    assert Path.cwd() == tmp_path and (sys.stdout, sys.stderr) == streams


def test_a_folder_that_the_users_code_deletes_is_no_place_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "import os\nos.mkdir('a')\nos.chdir('a')\nos.rmdir('../a')\nx = 1"
    )
    assert find_source("own.py:x").load() == 1
    assert Path.cwd() == tmp_path


def test_a_limit_leaves_nothing_behind() -> None:
    threads = threading.active_count()
    for _ in range(3):
        with time_limit(60):
            pass
    assert threading.active_count() == threads
    with time_limit(0.5):
        pass
    time.sleep(0.6)  # no signal comes late


def test_processor_time_of_other_threads_ends_nothing_early() -> None:
    with time_limit(60):
        signal.raise_signal(signal.SIGVTALRM)  # the kernel's timer, which counts all threads
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_call_in_another_thread_is_not_ended() -> None:
    """Signals reach the main thread alone, and docs/tasks.md says so."""
    ended: list[bool] = []

    def call() -> None:
        with time_limit(0.01):
            time.sleep(0.05)
        ended.append(True)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert ended == [True]
