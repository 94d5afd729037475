"""Which answers the report of a run shows: questions at several steps, one answer of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sodfast.run.samples import iterate_samples, sampled_steps, shown_hint
from sodfast.run.show import inert, mean, shaded

FILES, COLUMNS, QUESTIONS, TOKENS, LETTERS = 12, 4, 4, 400, 2000  # read or shown at most

T = TypeVar("T")


@dataclass(frozen=True)
class Shown:
    """An answer of a question at a step, and the rewards of all its answers there. `tokens`: text,
    shade and divergence of the first ones; `more`: how many follow."""

    step: int
    prompt: str
    rewards: list[float]
    reward: float
    length: int
    capped: bool
    divergence: float | None
    tokens: list[tuple[str, int, float | None]]
    more: int
    kind: str | None  # of the hint
    hint: str


def compare(run: Path, evaluation: bool = False) -> dict[str, list[Shown]]:
    """Question → its answer at up to `COLUMNS` steps, for up to `QUESTIONS` of them: first those
    that come up more than once, then others, chosen evenly. An answer that was distilled is shown
    rather than another. Empty where no answers are kept.

    Raises `UsageError` for a damaged line.
    """
    found: dict[str, list[Shown]] = {}
    steps = sampled_steps(run, evaluation)
    for step in _evenly(steps, COLUMNS if evaluation else FILES):
        for name, shown in _questions(run, step, evaluation):
            found.setdefault(name, []).append(shown)
    again = [name for name, cells in found.items() if len(cells) > 1][:QUESTIONS]
    once = [name for name, cells in found.items() if len(cells) == 1]
    chosen = [*again, *_evenly(once, QUESTIONS - len(again))]
    return {name: _evenly(found[name], COLUMNS) for name in chosen}


def _questions(run: Path, step: int, evaluation: bool) -> Iterator[tuple[str, Shown]]:
    """The questions of a step; of an evaluation, whose questions are always the same, the first."""
    groups = groupby(iterate_samples(run, step, evaluation), key=itemgetter("id"))
    for number, (name, rows) in enumerate(groups):
        if evaluation and number == QUESTIONS:
            return
        yield inert(name), _shown(list(rows))


def _shown(rows: Sequence[dict[str, Any]]) -> Shown:
    row = next((row for row in rows if row.get("divergence")), rows[0])
    tokens = shaded(row)
    return Shown(
        step=row["step"],
        prompt=inert(row["prompt"])[:LETTERS],
        rewards=[row["reward"] for row in rows],
        reward=row["reward"],
        length=row["length"],
        capped=row["capped"],
        divergence=mean(row.get("divergence")),
        tokens=tokens[:TOKENS],
        more=max(0, len(tokens) - TOKENS),
        kind=row["hint"],
        hint=inert(shown_hint(row))[:LETTERS],
    )


def _evenly(items: Sequence[T], most: int) -> list[T]:
    """At most so many of them, the first and the last among them."""
    chosen = np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int)
    return [items[index] for index in chosen]
