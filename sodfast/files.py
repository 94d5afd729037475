"""Files that others may read or hold at the same time: whole replacement, lines, and locks."""

import csv
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from sodfast.errors import UsageError

# What a spreadsheet takes for a formula: a sign that is not a number's, an @, a control character.
_FORMULA = re.compile(r"[=@\t\r]|[+-](?!\.?\d+\.?\d*(e[+-]?\d+)?\Z)")
_DEEPEST = 255  # folders that Python makes in one call without exhausting its stack


def replace_bytes(file: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    It is written aside first, under a name that nobody else has, whatever a link may point to. Of
    two writers that race the later one wins, whole.
    """
    aside = _aside(file)
    try:
        with aside.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def replace_text(file: Path, text: str) -> None:
    """`replace_bytes` of a text in UTF-8."""
    replace_bytes(file, text.encode())


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")


def remove_leftovers(directory: Path, names: Iterable[str]) -> None:
    """Delete what killed processes have left of files that they were to replace in `directory`.
    The caller holds the lock without which nobody replaces any of these."""
    for left in _leftovers(directory, names):
        if left.is_file() or left.is_symlink():
            left.unlink()


def _leftovers(directory: Path, names: Iterable[str]) -> list[Path]:
    """What stands aside in `directory` to get one of these names."""
    aside = re.compile(rf"({'|'.join(map(re.escape, names))})\.[0-9a-f]{{16}}\.tmp")
    return [directory / name for name in os.listdir(directory) if aside.fullmatch(name)]


def copy_files(
    source: Path,
    target: Path,
    names: Iterable[str],
    copy: Callable[[Path, Path], object] = shutil.copyfile,
) -> None:
    """Copy these files, by their names from `source`, to the same names in the folder `target`. Of
    a link what it names is copied."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy(source / name, target / name)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder aside that is filled in the block and then gets the name `target`, on disk as it is:
    whole, or not at all where the block raises. Its parents are made where they are missing.

    What processes that were killed have left of the same target is deleted first. A folder that is
    being filled is locked, so none is taken for left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in _leftovers(target.parent, [target.name]):
        if left.is_dir() and not left.is_symlink():
            with suppress(BlockingIOError, FileNotFoundError), _locked(left):
                shutil.rmtree(left)
    aside = _aside(target)
    aside.mkdir()
    try:
        with _locked(aside):
            yield aside
            sync(aside)
            os.rename(aside, target)
            sync_entry(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Raises `BlockingIOError` where another process holds the lock."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def sync(directory: Path) -> None:
    """Force a directory and everything in it to disk."""
    for path in [*directory.rglob("*"), directory]:
        sync_entry(path)


def sync_entry(path: Path) -> None:
    """Force a file to disk, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_csv(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as CSV, quoted where a cell holds a comma, a quote or a line break.

    A text that a spreadsheet would run as a formula gets an apostrophe before it.
    """
    lines: list[str] = []
    # The writer quotes a carriage return only where it may be a part of the line's end.
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n")
    writer.writerows(map(_inert, row) for row in rows)
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines)


def _inert(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def require_usable(path: Path, called: str) -> None:
    """Raise `UsageError`, in which the path is `called` so, for a name that no file can have: one
    that is too long or too deep, or a loop of links."""
    if len(path.parts) > _DEEPEST:
        raise UsageError(f"{called} cannot be used: more than {_DEEPEST} folders deep")
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UsageError(f"{called} cannot be used: {error.strerror}") from error


def refuse_links(directory: Path, names: Iterable[str]) -> None:
    """Raise `UsageError` where one of these names in `directory` is a symbolic link: what is
    written there would land elsewhere."""
    for name in names:
        if (directory / name).is_symlink():
            raise UsageError(f"{directory / name} is a symbolic link: replace it by what it names")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `UsageError` where there is none, `FileNotFoundError` where
    there is no file."""
    try:
        value = _parse(_read(file))
    except ValueError as error:
        raise UsageError(f"{file}: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{file}: no JSON object")
    return value


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a run, each an object with a `step`; none where there is no file.

    A last line cut short by a power failure, be it within a character, is left out. Raises
    `UsageError` with file and line for anything else.
    """
    if not os.path.isfile(file):
        return []
    texts = _read(file).removesuffix(b"\n").split(b"\n")
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = _parse(text)
        except ValueError as error:
            if number == len(texts):
                break
            raise UsageError(f"{file}:{number}: {error}") from error
        step = line.get("step") if isinstance(line, dict) else None
        if type(step) is not int or not 0 <= step < 2**63:
            raise UsageError(f"{file}:{number}: no object with a step")
        lines.append(line)
    return lines


def to_lines(lines: Iterable[Mapping[str, Any]]) -> str:
    """Objects as JSON lines, which `read_lines` takes back."""
    return "".join(json.dumps(line) + "\n" for line in lines)


def _read(file: Path) -> bytes:
    try:
        # A pipe waits for a writer, and /dev/zero has no end.
        if file.is_fifo() or file.is_char_device():
            raise UsageError(f"{file} is no regular file: replace it by one")
        return file.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error


def _parse(text: bytes) -> Any:
    """Raises `ValueError` for what is not JSON in UTF-8, or nested too deeply to be read."""
    try:
        return json.loads(text.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error


def try_lock(path: Path) -> IO[str] | None:
    """The lock, held until the file is closed in every process that inherited it, however these
    end; None: held by another."""
    lock = os.fdopen(_without_waiting(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _without_waiting(path: Path, flags: int) -> int:
    """A descriptor. A pipe in the place of a lock would wait for whoever is at its other end."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def is_held(lock: Path) -> bool:
    """Whether a living process holds this lock."""
    try:
        with os.fdopen(_without_waiting(lock, os.O_RDONLY)) as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, IsADirectoryError):
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def alone(directory: Path) -> Iterator[bool]:
    """Hold a lock on a directory, which is made where there is none, until the block ends; True
    where another process held it before, and this one has waited."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            waited = False
        except BlockingIOError:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            waited = True
        yield waited
    finally:
        os.close(descriptor)
