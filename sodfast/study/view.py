"""What a person sees of a sweep: a live table on a terminal, a line now and then elsewhere."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.live import Live
from rich.table import Table

from sodfast.files import is_held
from sodfast.run.console import Screen, open_console
from sodfast.study.definition import Trial
from sodfast.study.directory import failure_path, lock_path, run_path

PLAIN_SECONDS = 60.0  # plain output sums up this often


class Progress:
    """How far a run is, from its metrics.jsonl, of which each call reads only what is new."""

    def __init__(self, file: Path, eval_samples: int) -> None:
        self.file = file
        self._eval_key = f"eval/mean@{eval_samples}"
        self._reset()

    def _reset(self) -> None:
        self._inode = 0
        self._offset = 0
        self.step = 0
        self.reward: float | None = None
        self.eval: float | None = None
        self.refreshes: int | None = None  # None: no teacher that copies

    def update(self) -> None:
        try:
            with self.file.open("rb") as stream:
                found = os.fstat(stream.fileno())
                if found.st_ino != self._inode or found.st_size < self._offset:
                    self._reset()  # a resumed run has removed its last lines
                    self._inode = found.st_ino
                stream.seek(self._offset)
                text = stream.read()
        except FileNotFoundError:
            self._reset()
            return
        complete = text[: text.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in complete.splitlines()]
        except json.JSONDecodeError:  # another file of the same inode: read it from its start
            self._reset()
            return
        self._offset += len(complete)
        for line in lines:
            self._observe(line)

    def _observe(self, line: Mapping[str, Any]) -> None:
        self.step = line["step"]
        self.reward = line.get("reward/mean", self.reward)
        self.eval = line.get(self._eval_key, self.eval)
        if "teacher/refreshed" in line:
            self.refreshes = (self.refreshes or 0) + line["teacher/refreshed"]


class View:
    """The state of every trial. This one prints plain lines; `LiveView` draws a table."""

    seconds = 1.0  # between two looks at the trials

    def __init__(
        self, directory: Path, trials: Sequence[Trial], finished: Mapping[str, str]
    ) -> None:
        self.directory = directory
        self._screen = Screen()
        self.trials = {trial.name: trial for trial in trials}
        self.status = {name: finished.get(name, "waiting") for name in self.trials}
        self.progress = {
            name: Progress(run_path(directory, name) / "metrics.jsonl", trial.config.eval.samples)
            for name, trial in self.trials.items()
        }
        for progress in self.progress.values():
            progress.update()
        self._began = time.monotonic()
        self._first = {name: (self._began, self.progress[name].step) for name in self.trials}
        self._reported = self._began

    def refresh(self) -> None:
        """Look at the trials that have not ended."""
        for name, status in self.status.items():
            if status not in ("waiting", "running"):
                continue
            self.progress[name].update()
            running = is_held(lock_path(self.directory, name))
            if running and status == "waiting":
                self._first[name] = (time.monotonic(), self.progress[name].step)
                self.started(name)
            self.status[name] = "running" if running else "waiting"
        self.show()

    def ended(self, name: str, outcome: str) -> None:
        self.progress[name].update()
        self.status[name] = outcome
        text = f"{name}: {outcome}{self._figures(name)}"
        if outcome == "failed":
            text += f"  ({failure_path(self.directory, name).read_text().strip()})"
        self.message(text)

    def started(self, name: str) -> None:
        step = self.progress[name].step
        self.message(f"{name}: running" + (f" from step {step}" if step else ""))

    def show(self) -> None:
        if time.monotonic() - self._reported >= PLAIN_SECONDS:
            self._reported = time.monotonic()
            self.message(self.overview())
            for name, status in self.status.items():
                if status == "running":
                    self.message(f"  {name}{self._figures(name)}  eta {self.eta(name)}")

    def message(self, text: str) -> None:
        print(text, file=self._screen, flush=True)

    # ---------------------------------------------------------------- figures

    def overview(self) -> str:
        counts = Counter(self.status.values())
        states = ", ".join(f"{count} {status}" for status, count in counts.items())
        text = f"{len(self.trials)} trials: {states}"
        return f"{text}; eta {self.total_eta()}" if counts["waiting"] + counts["running"] else text

    def eta(self, name: str) -> str:
        since, first = self._first[name]
        return _eta(
            time.monotonic() - since, self.progress[name].step - first, self._remaining(name)
        )

    def total_eta(self) -> str:
        """At the pace at which this sweep has taken steps so far, on all trials together."""
        taken = sum(self.progress[name].step - first for name, (_, first) in self._first.items())
        open_ = [name for name, status in self.status.items() if status in ("waiting", "running")]
        return _eta(time.monotonic() - self._began, taken, sum(map(self._remaining, open_)))

    def _remaining(self, name: str) -> int:
        return self.trials[name].config.steps - self.progress[name].step

    def _figures(self, name: str) -> str:
        cells = self.cells(name)
        shown = [f"{key} {cells[key]}" for key in ("step", "reward", "eval", "refreshes")]
        return "".join("  " + text for text in shown if not text.endswith(" "))

    def cells(self, name: str) -> dict[str, str]:
        progress = self.progress[name]
        return {
            "step": f"{progress.step}/{self.trials[name].config.steps}",
            "reward": _number(progress.reward),
            "eval": _number(progress.eval),
            "refreshes": "" if progress.refreshes is None else str(progress.refreshes),
        }


class LiveView(View):
    """As many trials as the terminal has lines: running and failed ones first, then the last that
    ended, then those that wait."""

    def __init__(
        self, directory: Path, trials: Sequence[Trial], finished: Mapping[str, str], live: Live
    ) -> None:
        super().__init__(directory, trials, finished)
        self._live = live
        self._ended = list(finished)

    def started(self, name: str) -> None: ...  # the table shows it

    def ended(self, name: str, outcome: str) -> None:
        self._ended.append(name)
        super().ended(name, outcome)

    def message(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def show(self) -> None:
        rows = max(3, self._live.console.height - 8)
        self._live.update(self.table(rows), refresh=True)

    def table(self, rows: int) -> Table:
        table = Table(box=SIMPLE, caption=self.overview())
        for name in ("trial", "status"):
            table.add_column(name, no_wrap=True)
        for name in ("step", "reward", "eval", "refreshes", "eta"):
            table.add_column(name, justify="right", no_wrap=True)
        for name in self._order()[:rows]:
            status = self.status[name]
            eta = self.eta(name) if status == "running" else ""
            table.add_row(name, status, *self.cells(name).values(), eta)
        return table

    def _order(self) -> list[str]:
        urgent = [
            name
            for wanted in ("running", "failed")
            for name, status in self.status.items()
            if status == wanted
        ]
        return list(dict.fromkeys([*urgent, *reversed(self._ended), *self.status]))


@contextmanager
def build_view(
    directory: Path, trials: Sequence[Trial], finished: Mapping[str, str]
) -> Iterator[View]:
    if not sys.stdout.isatty():
        view = View(directory, trials, finished)
        view.message(view.overview())
        yield view
        return
    with Live(console=open_console(Screen()), auto_refresh=False) as live:
        view = LiveView(directory, trials, finished, live)
        yield view


def _eta(seconds: float, taken: int, remaining: int) -> str:
    if taken <= 0:
        return "unknown"
    left = int(seconds / taken * remaining)
    hours, minutes = divmod(left // 60, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{left % 60:02}s"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
