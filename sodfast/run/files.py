"""Files that others may read or hold at the same time: whole replacement, lines, and locks."""

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

from sodfast.errors import UsageError


def replace_text(file: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old text or the new, never a part."""
    aside = file.with_name(file.name + ".tmp")
    aside.write_text(text)
    os.replace(aside, file)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; a last line cut short by a power failure is left out."""
    if not file.is_file():
        return []
    texts = file.read_text().splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(texts):
                raise UsageError(f"{file}:{number}: not JSON ({error.msg})") from error
    return lines


def try_lock(path: Path) -> IO[str] | None:
    """The lock, held until the file is closed in every process that inherited it, however these
    end; None: held by another."""
    lock = path.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def is_held(lock: Path) -> bool:
    """Whether a living process holds this lock."""
    try:
        with lock.open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
