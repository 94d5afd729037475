"""A step's answers in a terminal: each token shaded by what student and teacher differ on it.

Shades are a scale of fixed divergences, so that answers of different steps compare. Without colour
a line of digits stands below each line of text. What a model says may be meant for the terminal:
control characters are spelled out and do nothing.
"""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from sodfast.errors import UsageError
from sodfast.run.records import require_run
from sodfast.run.samples import read_samples, sampled_steps, shown_hint

Sort = Literal["reward", "length", "divergence"]
Row = Mapping[str, Any]
Cell = tuple[str, int]  # a character or an escape, and its token's shade

SHADES = (0.01, 0.03, 0.1, 0.3)  # nats; a token's shade is how many of these it reaches
END = "∎"  # stands for the token that ended an answer
_COLOURS = ("", "grey93", "khaki1", "sandy_brown", "light_coral")
_MOST_LINES = 12  # of a prompt or a hint
_WRITTEN = {"\t": "    ", "\n": "\n", "\u200c": "\u200c", "\u200d": "\u200d"}  # joiners of scripts


def inert(text: str) -> str:
    """`text` without effect on whoever shows it: escapes, controls and marks of direction are
    spelled out, as \\x1b; a line break stays one, a tab is four spaces."""
    return "".join(_inert(letter) for letter in text)


def _inert(letter: str) -> str:
    if letter in _WRITTEN:
        return _WRITTEN[letter]
    if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return letter.encode("unicode_escape").decode()
    return letter


def shaded(row: Row) -> list[tuple[str, int, float | None]]:
    """For each token of an answer its inert text, its shade (0 to 4) and its divergence."""
    texts = [inert(text) for text in row["text"]]
    if not texts[-1] and not row["capped"]:
        texts[-1] = END
    divergences = row.get("divergence") or [None] * len(texts)
    return [
        (text, sum((d or 0) >= least for least in SHADES), d)
        for text, d in zip(texts, divergences, strict=True)
    ]


def mean(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def chosen_answers(
    run: Path,
    step: int | None,
    question: str | None = None,
    sort: Sort | None = None,
    limit: int = 5,
    evaluation: bool = False,
) -> list[tuple[int, dict[str, Any]]]:
    """The answers of a step (None: the last one kept), or of the evaluation after it, and their
    line numbers from 0: the first `limit` of those to `question`, by default of all; the greatest
    of `sort` first.

    Raises `UsageError` where there are none, or for a damaged line.
    """
    require_run(run)
    if limit < 1:
        raise UsageError(f"--limit={limit}: show at least 1 answer")
    steps = sampled_steps(run, evaluation)
    if step is None and not steps:
        kind = "evaluation" if evaluation else "step"
        raise UsageError(
            f"{run} has kept the answers of no {kind}: log.samples_every says when it does"
        )
    rows = list(enumerate(read_samples(run, steps[-1] if step is None else step, evaluation)))
    if question is not None:
        ids = list(dict.fromkeys(row["id"] for _, row in rows))
        rows = [(index, row) for index, row in rows if row["id"] == question]
        if not rows:
            known = ", ".join(ids[:5])
            raise UsageError(f"no question {question!r} at that step, which asked {known}, …")
    if sort is not None:
        rows.sort(key=lambda item: _rank(item[1], sort), reverse=True)
    return rows[:limit]


def _rank(row: Row, sort: Sort) -> float:
    if sort == "divergence":
        found = mean(row.get("divergence"))
        return -1.0 if found is None else found
    return float(row[sort])


def describe_answers(answers: Sequence[tuple[int, Row]], console: Console) -> list[str]:
    """What is printed of these answers, for `console`: as wide as it is, with colours where it has
    any."""
    coloured = console.color_system is not None and not console.no_color
    distilled = any(row.get("divergence") for _, row in answers)
    lines = _legend(console, coloured) if distilled else []
    for index, row in answers:
        lines += ["", "─" * console.width, *_wrapped_plain(_headline(index, row), console.width)]
        lines += _part("prompt", row["prompt"], console.width)
        lines += ["answer"]
        cells = [(letter, shade) for text, shade, _ in shaded(row) for letter in text]
        for line in _wrap(cells, console.width - 2):
            lines += [f"  {text}" for text in _draw(line, console, coloured)]
        if row["feedback"] is not None:
            lines += _part("feedback", row["feedback"], console.width)
        if hint := shown_hint(row):
            source = row["hint_source"]
            origin = "" if source is None else f", answer {source}"
            lines += _part(f"hint ({row['hint']}{origin})", hint, console.width)
    return lines


def _legend(console: Console, coloured: bool) -> list[str]:
    if coloured:
        shades = [(f" {least:g} ", shade) for shade, least in enumerate(SHADES, start=1)]
        parts = [("divergence per token, from ", 0), *shades, (" nats", 0)]
        cells = [(letter, shade) for text, shade in parts for letter in text]
        return [_draw(line, console, coloured)[0] for line in _wrap(cells, console.width)]
    names = [f"{shade}: {least:g}" for shade, least in enumerate(SHADES, start=1)]
    text = f"digits: divergence of the token above from {', '.join(names)} nats"
    return _wrapped_plain(text, console.width)


def _headline(index: int, row: Row) -> str:
    name = inert(row["id"]).replace("\n", " ")
    facts = [f"step {row['step']}", name, f"answer {index}", f"reward {row['reward']:g}"]
    facts.append(f"length {row['length']}{' (capped)' if row['capped'] else ''}")
    if row["advantage"] is not None:
        facts.append(f"advantage {row['advantage']:+.3g}")
    if (divergence := mean(row.get("divergence"))) is not None:
        facts.append(f"divergence {divergence:.3g}")
    facts.append(f"entropy {mean(row['entropy']) or 0:.3g}")
    return "  ".join(facts)


def _part(name: str, text: str, width: int) -> list[str]:
    lines = _wrapped_plain(inert(text), width - 2)
    if len(lines) > _MOST_LINES:
        half = _MOST_LINES // 2
        lines = [*lines[:half], f"… {len(lines) - 2 * half} lines …", *lines[-half:]]
    return [name, *(f"  {line}" for line in lines)]


def _wrapped_plain(text: str, width: int) -> list[str]:
    lines = _wrap([(letter, 0) for letter in text], width)
    return ["".join(letter for letter, _ in line).rstrip() for line in lines]


def _wrap(cells: Sequence[Cell], width: int) -> Iterator[list[Cell]]:
    """Lines of at most `width` columns, broken behind a space where there is one."""
    line: list[Cell] = []
    used = 0
    for letter, shade in cells:
        if letter == "\n":
            yield line
            line, used = [], 0
            continue
        wide = cell_len(letter)
        if used + wide > width:
            spaces = [at for at, (other, _) in enumerate(line) if other == " "]
            cut = spaces[-1] + 1 if spaces else len(line)
            yield line[:cut]
            line = line[cut:]
            used = sum(cell_len(other) for other, _ in line)
        line.append((letter, shade))
        used += wide
    yield line


def _draw(line: Sequence[Cell], console: Console, coloured: bool) -> list[str]:
    """The line with its shades as backgrounds; without colours, with digits below."""
    if coloured:
        runs: list[Cell] = []
        for letter, shade in line:
            if runs and runs[-1][1] == shade:
                runs[-1] = (runs[-1][0] + letter, shade)
            else:
                runs.append((letter, shade))
        return [_styled(runs, console)]
    text = "".join(letter for letter, _ in line)
    marks = "".join((str(shade) if shade else " ") * cell_len(letter) for letter, shade in line)
    return [text, marks.rstrip()] if marks.strip() else [text]


def _styled(runs: Sequence[Cell], console: Console) -> str:
    text = Text()
    for part, shade in runs:
        text.append(part, f"black on {_COLOURS[shade]}" if shade else "")
    with console.capture() as captured:
        console.print(text, end="", soft_wrap=True)
    return captured.get()
