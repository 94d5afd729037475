"""Files that others read or hold at the same time: whole replacement, lines, and locks."""

import csv
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sodfast import files
from sodfast.errors import UsageError
from sodfast.files import (
    is_held,
    read_lines,
    read_object,
    remove_leftovers,
    replace_text,
    to_csv,
    to_lines,
    try_lock,
    whole_folder,
)


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    lines = [{"step": 0, "text": "é\n\u2028"}, {"step": 1, "value": 1e-300, "none": None}]
    (tmp_path / "lines.jsonl").write_text(to_lines(lines))
    assert read_lines(tmp_path / "lines.jsonl") == lines
    assert to_lines([]) == ""


# ---------------------------------------------------------------- whole replacement


def test_a_file_is_replaced_as_a_whole_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    for text in ("first", "the second, longer", ""):
        replace_text(file, text)
        assert file.read_text() == text and list(tmp_path.iterdir()) == [file]


def test_an_open_reader_keeps_the_text_that_it_opened(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    replace_text(file, "old")
    with file.open() as reader:
        replace_text(file, "new")
        assert reader.read() == "old"
    assert file.read_text() == "new"


def test_an_interruption_before_the_replacement_leaves_the_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "summary.json"
    replace_text(file, "old")

    def crash(source: Path, target: Path) -> None:
        assert source.read_text() == "new" and target == file
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.os, "replace", crash)
        replace_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def killed(act: Callable[[], object]) -> None:
    """Call `act` in a process that is killed when it renames anything."""

    def die(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        os.replace = os.rename = die  # type: ignore[assignment]
        act()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_what_a_killed_process_left_of_a_file_goes_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    killed(lambda: replace_text(file, "new"))
    (left,) = tmp_path.iterdir()
    others = ["summary.json.tmp", "other.json.0123456789abcdef.tmp", "a.summary.json", "table.csv"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / f"summary.json.{'0' * 16}.tmp").symlink_to(tmp_path / "table.csv")
    remove_leftovers(tmp_path, ["config.yaml", "summary.json"])
    assert not left.exists() and sorted(os.listdir(tmp_path)) == sorted(others)


# ---------------------------------------------------------------- whole folders


def fill(target: Path, text: str = "new") -> None:
    with whole_folder(target) as folder:
        (folder / "below").mkdir()
        (folder / "below" / "file").write_text(text)


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "made" / "out"
    for end in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        with pytest.raises(type(end)), whole_folder(target) as folder:
            (folder / "file").touch()
            raise end
        assert not list(target.parent.iterdir())
    fill(target)
    assert (target / "below" / "file").read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_what_a_killed_process_left_of_a_folder_goes_with_the_next(tmp_path: Path) -> None:
    target = tmp_path / "out"
    killed(lambda: fill(target, "old"))
    (left,) = tmp_path.iterdir()
    assert (left / "below" / "file").read_text() == "old"  # it may be half of what was meant
    other = tmp_path / f"other.{'0' * 16}.tmp"
    link = tmp_path / f"out.{'0' * 16}.tmp"
    other.mkdir()
    link.symlink_to(other)
    fill(target)
    assert sorted(tmp_path.iterdir()) == sorted([target, other, link])
    assert (target / "below" / "file").read_text() == "new"


def test_a_folder_that_another_process_is_filling_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OSError, match="not empty"), whole_folder(target) as first:
        (first / "file").write_text("first")
        fill(target)
        assert (first / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "below" / "file").read_text() == "new"


# ---------------------------------------------------------------- tables


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=("Cs",))), min_size=2)))
def test_a_table_reads_back_cell_by_cell(rows: list[list[str]]) -> None:
    """Commas, quotes and line breaks, too; an apostrophe stands before what would be a formula."""
    found = read_csv(to_csv(rows))
    for row, expected in zip(found, rows, strict=True):
        for cell, own in zip(row, expected, strict=True):
            assert cell in (own, f"'{own}")


def read_csv(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


@pytest.mark.parametrize(
    "text", ["=cmd|' /C calc'!A1", "+1+1", "-2+3*cmd", "@SUM(A1)", "\t=1", "\r=1", "-", "+a"]
)
def test_a_formula_is_a_text(text: str) -> None:
    assert read_csv(to_csv([["name", text]])) == [["name", f"'{text}"]]


@pytest.mark.parametrize("cell", [-1.5, 3, "-1.5", "+2", "-1e-05", "-.5", "seed0,lr-1", "a=b", ""])
def test_a_number_and_a_name_stay_what_they_are(cell: str | float) -> None:
    assert read_csv(to_csv([["name", cell]])) == [["name", str(cell)]]


def test_a_missing_cell_is_empty() -> None:
    assert to_csv([["a", None, 0.1]]) == "a,,0.1\n"


# ---------------------------------------------------------------- lines


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "metrics.jsonl") == []
    assert read_lines(tmp_path) == []


@given(st.integers(0, 60))
def test_a_last_line_cut_short_is_left_out_wherever_it_was_cut(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    file = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    texts = ['{"step": 0, "name": "a b"}', '{"step": 1, "x": [1.5, null]}']
    whole = "\n".join(texts) + "\n"
    file.write_text(whole[:cut])
    complete = [i for i in (0, 1) if cut >= len("\n".join(texts[: i + 1]))]
    assert [line["step"] for line in read_lines(file)] == complete


def test_a_broken_line_before_the_last_is_named(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"step": 0}\n{"step": \n{"step": 2}\n')
    with pytest.raises(UsageError, match=r"events\.jsonl:2: not JSON"):
        read_lines(file)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_file_that_never_ends_is_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "summary.json"
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=r"summary\.json is no regular file"):
        read_object(file)


# ---------------------------------------------------------------- locks


def test_a_lock_is_held_once_and_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = try_lock(path)
    assert lock is not None
    assert try_lock(path) is None and is_held(path)
    lock.close()
    assert not is_held(path)
    again = try_lock(path)
    assert again is not None
    again.close()


def test_a_pipe_in_the_place_of_a_lock_makes_nobody_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    assert not is_held(tmp_path / "lock")
    with pytest.raises(OSError, match="No such device"):
        try_lock(tmp_path / "lock")


def test_a_lock_is_held_while_a_process_that_inherited_it_lives(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = try_lock(path)
    assert lock is not None
    inherited = os.dup(lock.fileno())  # what a child of the sweep gets
    lock.close()
    assert is_held(path) and try_lock(path) is None
    os.close(inherited)
    assert not is_held(path)


def test_asking_about_a_lock_neither_makes_nor_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_held(path) and not path.exists()
    path.touch()
    assert not is_held(path) and not is_held(path)
    lock = try_lock(path)
    assert lock is not None
    lock.close()
