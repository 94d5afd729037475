"""What a person watches: progress bars on a terminal, plain lines elsewhere, the final table."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO, cast

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

PLAIN_SECONDS = 5.0  # plain output reports at most this often within a phase


class Screen:
    """Standard output of a command that must not end because nobody reads it.

    Where it cannot be written (its reader has gone, its disk is full, the user's own code has
    closed it), one line on standard error says so, and whatever is written from then on is
    discarded: `off` is then True.
    """

    def __init__(self) -> None:
        # As they are now: while bars are shown, rich puts streams of its own in their place.
        self._out, self._err = sys.stdout, sys.stderr
        self.off = False

    def write(self, text: str) -> int:
        self._try(partial(self._out.write, text))
        return len(text)

    def flush(self) -> None:
        self._try(self._out.flush)

    def isatty(self) -> bool:
        return not self._out.closed and self._out.isatty()

    def _try(self, write: Callable[[], object]) -> None:
        if self._out.closed:
            if not self.off:
                self._switch_off("it has been closed")
            return
        try:
            write()
        except OSError as error:
            self._switch_off(str(error.strerror))

    def _switch_off(self, reason: str) -> None:
        _discard(self._out)
        self.off = True
        text = f"sodfast: standard output cannot be written ({reason}): going on without it"
        if self._err.closed:
            return
        try:
            print(text, file=self._err, flush=True)
        except OSError:  # both may go to the same place
            _discard(self._err)


def _discard(stream: TextIO) -> None:
    """Connect a stream's descriptor to nothing; what is still buffered, which Python would try to
    write again when it exits, goes there, too."""
    if stream.closed:
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    if nothing != stream.fileno():  # it gets the stream's own number where that has been closed
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def open_console(screen: Screen | None) -> Console:
    """rich's console on `screen`, or on standard output."""
    return Console(file=cast("TextIO | None", screen))


class Reporter:
    """How the trainer tells what it is doing. This one says nothing; its subclasses do.

    `done` and `total` count the items of a phase; a total of 0 says that their number is unknown.
    """

    def start(self, step: int, steps: int) -> None: ...

    def phase(self, name: str, done: int = 0, total: int = 0) -> None: ...

    def line(self, line: Mapping[str, Any]) -> None: ...

    def message(self, text: str) -> None: ...

    def stop(self) -> None:
        """No more reports; leave the terminal as it was."""


def build_reporter(screen: Screen | None = None) -> Reporter:
    """Reports on `screen`, or on standard output, whose errors then end the command."""
    return BarReporter(screen) if sys.stdout.isatty() else PlainReporter(screen)


def describe(line: Mapping[str, Any]) -> str:
    """One metrics line in a few words."""
    parts = []
    if "reward/mean" in line:
        parts += [f"reward {line['reward/mean']:.3f}", f"length {line['length/mean']:.1f}"]
        parts += [f"entropy {line['policy/entropy']:.3f}"]
    parts += [f"{k} {v:.3f}" for k, v in line.items() if k.startswith("eval/mean@")]
    if "time/tokens_per_second" in line:
        parts.append(f"{line['time/tokens_per_second']:.0f} tok/s")
    if line.get("teacher/refreshed"):
        parts.append("teacher refreshed")
    return "  ".join(parts)


class PlainReporter(Reporter):
    """One line per step; long phases say how far they are now and then."""

    def __init__(self, screen: Screen | None) -> None:
        self._screen = screen
        self._steps = 0
        self._began = (0, 0.0)
        self._last = time.monotonic()

    def start(self, step: int, steps: int) -> None:
        self._steps = steps
        self._began = (step, time.monotonic())

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        if total and time.monotonic() - self._last > PLAIN_SECONDS:
            self.message(f"{name} {done}/{total}")

    def line(self, line: Mapping[str, Any]) -> None:
        step, (first, since) = line["step"], self._began
        eta = ""
        if step > first:
            seconds = (time.monotonic() - since) / (step - first) * (self._steps - step)
            eta = f"  eta {seconds:.0f}s"
        self.message(f"step {step}/{self._steps}  {describe(line)}{eta}")

    def message(self, text: str) -> None:
        self._last = time.monotonic()
        print(text, file=self._screen, flush=True)


class BarReporter(Reporter):
    """Two bars: the run's steps with reward and ETA, and the phase under way."""

    def __init__(self, screen: Screen | None) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=open_console(screen),
        )
        self._run: Any = None
        self._phase = self._bars.add_task("", total=1, note="", visible=False)
        self._bars.start()

    def start(self, step: int, steps: int) -> None:
        self._run = self._bars.add_task("steps", total=steps, completed=step, note="")

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        self._bars.update(
            self._phase, description=name, completed=done, total=total or None, visible=True
        )

    def line(self, line: Mapping[str, Any]) -> None:
        self._bars.update(self._run, completed=line["step"], note=describe(line))
        if any(key.startswith("eval/") for key in line) or line.get("teacher/refreshed"):
            self.message(f"step {line['step']}  {describe(line)}")

    def message(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        self._bars.stop()


def run_table(summary: Mapping[str, Any], lines: list[dict[str, Any]]) -> Table:
    """The run's evaluations, and its verdict underneath."""
    evaluated = [line for line in lines if any(key.startswith("eval/") for key in line)]
    table = Table(
        box=SIMPLE, title=f"{summary['schedule']} seed {summary['seed']}: {summary['status']}"
    )
    table.add_column("step", justify="right")
    keys = [key for key in (evaluated[0] if evaluated else {}) if key.startswith("eval/")]
    shown = [key for key in keys if "mean@" in key] + [keys[i] for i in _last_of_each(keys)]
    names = {
        **{key: key.removeprefix("eval/") for key in shown},
        "reward/mean": "reward",
        "length/mean": "length",
        "policy/entropy": "entropy",
        "distill/divergence": "D",
        "teacher/age": "age",
    }
    for name in names.values():
        table.add_column(name, justify="right", no_wrap=True)
    for line in evaluated:
        cells = [_cell(line.get(key)) for key in names]
        table.add_row(str(line["step"]), *cells)
    refreshes = ", ".join(map(str, summary["refresh_steps"])) or "none"
    table.caption = f"refreshes: {refreshes}; collapse step: {summary['collapse_step']}"
    return table


def curves(lines: list[dict[str, Any]], width: int = 36) -> Table:
    """Each quantity over the run's steps as one row of blocks, from its least to its greatest
    value; a column is the mean of its share of the steps, and `v` marks a refresh."""
    table = Table(box=SIMPLE)
    for name, justify in (("curve", "left"), ("least", "right"), ("greatest", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    steps = [line for line in lines if line["step"] > 0]
    columns = min(width, len(steps))
    table.add_column(f"steps 1 to {len(steps)}", no_wrap=True, min_width=columns)
    cuts = [round(i * len(steps) / columns) for i in range(columns + 1)] if columns else []
    shares = [steps[a:b] for a, b in pairwise(cuts)]
    for key in _CURVES:
        means = [_mean([line[key] for line in share if key in line]) for share in shares]
        known = [mean for mean in means if mean is not None]
        if known:
            least, greatest = min(known), max(known)
            row = "".join(_block(mean, least, greatest) for mean in means)
            table.add_row(key, f"{least:.3f}", f"{greatest:.3f}", row)
    marks = ["v" if any(line.get("teacher/refreshed") for line in s) else " " for s in shares]
    if "v" in marks:
        table.add_row("refresh", "", "", "".join(marks))
    return table


_CURVES = (
    "reward/mean",
    "length/mean",
    "length/tail_ratio",
    "policy/entropy",
    "distill/divergence",
    "teacher/drift",
)
_BLOCKS = "▁▂▃▄▅▆▇█"


def _block(value: float | None, least: float, greatest: float) -> str:
    if value is None:
        return " "
    share = (value - least) / (greatest - least) if greatest > least else 0.0
    return _BLOCKS[min(int(share * len(_BLOCKS)), len(_BLOCKS) - 1)]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _last_of_each(keys: list[str]) -> list[int]:
    """Positions of the largest k of best@k and maj@k; metrics list k in ascending order."""
    return [
        max(index for index, key in enumerate(keys) if name in key)
        for name in ("best@", "maj@")
        if any(name in key for key in keys)
    ]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def print_run(
    path: Path, summary: Mapping[str, Any], lines: list[dict[str, Any]], screen: Screen
) -> None:
    console = open_console(screen)
    console.print(run_table(summary, lines))
    console.print(curves(lines))
    print(f"metrics: {path / 'metrics.jsonl'}", file=screen, flush=True)
