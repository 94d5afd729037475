"""The files that a run is read from beside its model, and their hashes: what a resumed run must
find as it was."""

import hashlib
import os
from pathlib import Path

from sodfast.config import (
    Config,
    PythonConfig,
    PythonScheduleConfig,
    RowsConfig,
    ScheduleConfig,
    TaskConfig,
)
from sodfast.source import find_source


def run_files(config: Config) -> dict[str, str]:
    """`file_hashes` of everything that a run is read from."""
    found: dict[str, str] = {}
    for part in (config.task, *config.eval.tasks.values(), config.schedule):
        found |= file_hashes(part)
    return found


def file_hashes(config: TaskConfig | ScheduleConfig) -> dict[str, str]:
    """SHA-256 of every file by its path: rows, the user's source, and what that imports beside it.

    Hub ids are no files; the package `datasets` keeps the revision that it has downloaded.

    Raises:
        UsageError: the user's source is not there.
    """
    files: list[Path] = []
    if isinstance(config, PythonConfig):
        files += find_source(config.source).files()
    if isinstance(config, PythonScheduleConfig):
        files += find_source(config.source, "schedule.source").files()
    if isinstance(config, RowsConfig):
        for source in filter(None, (config.train, config.test)):
            folder = os.path.isdir(source) and not source.endswith(".jsonl")
            files += sorted(Path(source).rglob("*")) if folder else [Path(source)]
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()
    }


def changed_file(found: dict[str, str], stored: dict[str, str]) -> str | None:
    """The first file that is not as it was, None where all are."""
    names = sorted(found.keys() | stored.keys())
    return next((name for name in names if found.get(name) != stored.get(name)), None)
