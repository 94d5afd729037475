"""Question rows from JSONL files and from the Hugging Face hub, checked before any work starts."""

import importlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sodfast.config import RowsConfig, SplitConfig
from sodfast.errors import UsageError
from sodfast.tasks.base import Question

Row = dict[str, Any]
Placed = tuple[str, Row]  # "line 7" or "row 7", and the row

SPLIT_SEED = 42
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_logger = logging.getLogger(__name__)


def _number(text: str) -> int | float:
    """Whole numbers become int, so that 1 and 1.0 are the same JSON number."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is out of range")
    return int(value) if value.is_integer() else value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# Python's own decoder accepts NaN and Infinity and turns 1e999 into inf; this one refuses them.
# It raises ValueError, or RecursionError where the nesting is too deep.
strict_json = json.JSONDecoder(parse_float=_number, parse_constant=_refuse_constant)


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("an object gives one of its keys twice")
    return row


# Of a file, a key given twice is refused too. (In an answer the last one counts.)
_row_json = json.JSONDecoder(
    parse_float=_number, parse_constant=_refuse_constant, object_pairs_hook=_unique
)


def load_questions(
    config: RowsConfig,
    check: Callable[[Question], None],
    *,
    keep: Callable[[Row], bool] = lambda row: True,
    convert: Callable[[Row], Row | None] = lambda row: row,
    needs_answer: bool = True,
) -> tuple[Sequence[Question], Sequence[Question]]:
    """Load the training and the test questions.

    A name that ends in .jsonl or is a file on disk is a file of rows, a folder on disk and
    `org/name` (or `org/name:subset`) what the package `datasets` reads. Such a source without
    `test` is split 9:1 by a permutation of seed 42, the published split of SciKnowEval in
    arXiv 2601.20802, unless `task.split` names a split for each. `keep` selects rows of a hub id
    before the split; `convert` brings them into the layout of the files after it, or answers None
    for a row to drop. Neither is used where `task.columns` says what the rows hold.

    Raises:
        UsageError: a source is missing or empty, or holds a row that cannot be used.
            `check` raises it for an answer that does not fit; the row's place is put in front.
    """
    train, test, splits = _sources(config)
    if config.columns:
        keep, convert = lambda row: True, lambda row: row
    train_rows = _read(train, splits[0], keep)
    if test is None:
        train_rows, test_rows = _split(train, train_rows)
    else:
        test_rows = _read(test, splits[1], keep)

    def questions(source: str, rows: Sequence[Placed]) -> list[Question]:
        if not os.path.exists(source):
            converted = [(place, convert(row)) for place, row in rows]
            rows = [(place, row) for place, row in converted if row is not None]
            if len(rows) < len(converted):
                _logger.warning("%s: dropped %d flawed rows", source, len(converted) - len(rows))
        found = [_question(source, place, row, config, check, needs_answer) for place, row in rows]
        if _is_file(source):
            _refuse_shared_ids(source, rows, found)
        return found

    return questions(train, train_rows), questions(test or train, test_rows)


def _refuse_shared_ids(source: str, rows: Sequence[Placed], questions: list[Question]) -> None:
    """Raise `UsageError` where two rows of a file would go by one name in every record of a run."""
    first: dict[str, str] = {}
    for question, (place, _) in zip(questions, rows, strict=True):
        other = first.setdefault(question.id, place)
        if other != place:
            raise UsageError(
                f"{source}, {place}: id {question.id[:100]} is also that of {other}: give each row "
                "its own"
            )


def _sources(config: RowsConfig) -> tuple[str, str | None, tuple[str, str]]:
    """Where the training and the test rows are (None: a part of the training rows), and the splits
    to read of them."""
    train, test, split = config.train, config.test, config.split
    assert train is not None, "only a task that brings its own questions has none"
    if isinstance(split, SplitConfig):
        return train, test or train, (split.train, split.test)
    if test is not None and os.path.realpath(test) == os.path.realpath(train):
        raise UsageError(f"task.test: {test} is also task.train, name other rows to test on")
    if test is None and _is_file(train):
        raise UsageError("task.test: name a file of test rows (only a hub id is split 9:1)")
    return train, test, (split or "train", "test")


def _is_file(source: str) -> bool:
    return source.endswith(".jsonl") or os.path.isfile(source)


def _read(source: str, split: str, keep: Callable[[Row], bool]) -> list[Placed]:
    if _is_file(source):
        return _read_file(source)
    return _read_data(source, split, (lambda row: True) if os.path.isdir(source) else keep)


def _read_file(source: str) -> list[Placed]:
    try:
        # Only \n, \r\n and \r end a line here; str.splitlines would also cut inside strings.
        with open(source, encoding="utf-8-sig") as file:
            lines = file.readlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{source}: not UTF-8 text, save it as UTF-8 ({error.reason})") from error
    except OSError as error:
        raise UsageError(f"{source}: cannot be read, check task.* ({error.strerror})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        place = f"{source}, line {number}"
        try:
            row = _row_json.decode(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{place}: not JSON, column {error.colno}: {error.msg}") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{place}: not JSON, {error}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{place}: must be a JSON object, not {_type(row)}")
        rows.append((f"line {number}", row))
    if not rows:
        raise UsageError(f"{source}: holds no rows, name a JSONL file with one question a line")
    return rows


def _read_data(source: str, split: str, keep: Callable[[Row], bool]) -> list[Placed]:
    """Rows of a hub id or of a local folder."""
    if not os.path.isdir(source) and not _HUB_ID.fullmatch(source):
        raise UsageError(f"{source}: no such file, and not a hub id of the form org/name")
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        kind = "it" if os.path.isdir(source) else "no such file, and reading it as a hub id"
        raise UsageError(f"{source}: {kind} needs `pip install 'sodfast[datasets]'`") from error
    try:
        splits = _load(datasets, source)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{source}: the hub gives no such data set ({reason})") from error
    if split not in splits and (len(splits) > 1 or split not in ("train", "test")):
        raise UsageError(f"{source}: has no split {split!r}, only {', '.join(splits)}")
    rows = splits[split] if split in splits else next(iter(splits.values()))
    try:
        kept = [(f"row {i}", row) for i, row in enumerate(rows) if keep(row)]
    except KeyError as error:
        raise UsageError(f"{source}: has no column {error}, not the layout of this task") from error
    if not kept:
        raise UsageError(f"{source}: no row of {len(rows)} is of the kind asked for in task.*")
    return kept


def _load(datasets: Any, source: str) -> Any:
    """All splits of a data set by name: of a folder that `save_to_disk` wrote, of a folder of data
    files, or of a hub id."""
    if os.path.isdir(source):
        saved = [os.path.join(source, name) for name in ("dataset_dict.json", "state.json")]
        if any(map(os.path.isfile, saved)):
            found = datasets.load_from_disk(source)
            return found if isinstance(found, dict) else {"train": found}
        return datasets.load_dataset(source)
    name, _, subset = source.partition(":")
    return datasets.load_dataset(name, *([subset] if subset else []))


def _split(source: str, rows: Sequence[Placed]) -> tuple[list[Placed], list[Placed]]:
    if len(rows) < 2:
        raise UsageError(f"{source}: one row cannot be split, name other rows in task.test")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(rows))
    test_count = math.ceil(len(rows) / 10)
    return [rows[i] for i in order[test_count:]], [rows[i] for i in order[:test_count]]


def _question(
    source: str,
    place: str,
    row: Row,
    config: RowsConfig,
    check: Callable[[Question], None],
    needs_answer: bool,
) -> Question:
    name = place
    place = f"{source}, {place}"
    row = _renamed(place, row, config.columns)
    name = next((row[key] for key in ("id", "idx") if row.get(key) is not None), name)
    prompt, system, history = _messages(place, row)
    if needs_answer and row.get("answer") is None:
        raise UsageError(f"{place}: field 'answer' is missing")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise UsageError(f"{place}: field 'id' must be text or a whole number, not {_type(name)}")
    require_unicode(place, str(name))
    question = Question(
        prompt=f"{prompt}\n\n{config.request}" if config.request else prompt,
        answer=row.get("answer"),
        system=system if config.system is None else config.system,
        id=str(name),
        history=history,
        columns=row,
    )
    try:
        check(question)
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from error
    return question


def require_unicode(place: str, name: str) -> None:
    """Raise `UsageError` for an id with half of a surrogate pair: no file of a run can hold it."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{place}: id {name[:40]!r} is no Unicode text") from error


def _renamed(place: str, row: Row, columns: Mapping[str, str]) -> Row:
    """The row under our names: `columns` has ours → theirs."""
    for ours, theirs in columns.items():
        if theirs not in row:
            raise UsageError(
                f"{place}: no column {theirs!r} (there are {', '.join(row)}): mend "
                f"task.columns.{ours}"
            )
    taken = set(columns.values())
    rest = {key: value for key, value in row.items() if key not in taken}
    return rest | {ours: row[theirs] for ours, theirs in columns.items()}


def _messages(place: str, row: Row) -> tuple[str, str | None, tuple[Mapping[str, str], ...]]:
    """The user's last turn, the system message, and the messages between the two."""
    prompt, system = row.get("prompt"), row.get("system")
    history: list[Mapping[str, str]] = []
    if isinstance(prompt, list):
        messages = prompt
        if not messages or not all(map(_is_message, messages)) or messages[-1]["role"] != "user":
            raise UsageError(
                f"{place}: field 'prompt' must be text, not a list, unless it is one of chat "
                "messages with 'role' and 'content', the last one the user's"
            )
        *history, last = messages
        prompt = last["content"]
        if history and history[0]["role"] == "system":
            if system is not None:
                raise UsageError(f"{place}: field 'system' and a system message: leave one out")
            system = history.pop(0)["content"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise UsageError(f"{place}: field 'prompt' must be text, not {_type(prompt)}")
    if not isinstance(system, str | None):
        raise UsageError(f"{place}: field 'system' must be text or null, not {_type(system)}")
    return prompt, system, tuple(history)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def _type(value: Any) -> str:
    """Return the JSON name of a value's type, "nothing" for a missing one."""
    match value:
        case None:
            return "nothing"
        case str() if not value.strip():
            return "empty text"
        case bool():
            return "true or false"
        case str():
            return "text"
        case int() | float():
            return "a number"
        case list():
            return "a list"
        case _:
            return "an object"
