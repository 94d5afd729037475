"""What a person sees of a sweep: a live table on a terminal, a line now and then elsewhere."""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE
from rich.live import Live
from rich.table import Table

from sodfast.errors import UsageError
from sodfast.files import is_held
from sodfast.run.console import Screen, open_console
from sodfast.run.records import read_metrics
from sodfast.study.definition import Trial
from sodfast.study.directory import failure_path, lock_path, run_path

PLAIN_SECONDS = 60.0  # plain output sums up this often
OPEN = ("waiting", "running")


class Progress:
    """How far a run is, from its metrics.jsonl, which is read again when it has changed."""

    def __init__(self, run: Path, eval_samples: int, first: int = 0) -> None:
        self.run = run
        self._eval_key = f"eval/mean@{eval_samples}"
        self._seen: tuple[int, ...] = ()
        self._first = first  # where it begins: a fork after its step
        self.step = first
        self.reward: float | None = None
        self.eval: float | None = None
        self.refreshes: int | None = None  # None: no teacher that copies

    def update(self) -> None:
        """Look again. Of a damaged file nothing is taken: the table says what is wrong with it."""
        try:
            found = os.stat(self.run / "metrics.jsonl")
            seen: tuple[int, ...] = (found.st_ino, found.st_size, found.st_mtime_ns)
            if seen == self._seen:
                return
            lines = read_metrics(self.run)
        except FileNotFoundError:
            seen, lines = (), []
        except UsageError:
            return
        self._seen = seen
        last = {key: value for line in lines for key, value in line.items()}
        self.step = last.get("step", self._first)
        self.reward, self.eval = last.get("reward/mean"), last.get(self._eval_key)
        copies = [line["teacher/refreshed"] for line in lines if "teacher/refreshed" in line]
        self.refreshes = sum(copies) if copies else None


class View:
    """The state of every trial: a table on `live`, or plain lines where there is none."""

    seconds = 1.0  # between two looks at the trials

    def __init__(
        self,
        directory: Path,
        trials: Sequence[Trial],
        finished: Mapping[str, str],
        live: Live | None = None,
    ) -> None:
        self.directory = directory
        self.trials = {trial.name: trial for trial in trials}
        self.status = {name: finished.get(name, "waiting") for name in self.trials}
        self.progress = {
            name: Progress(
                run_path(directory, name),
                trial.config.eval.samples,
                trial.fork.step if trial.fork else 0,
            )
            for name, trial in self.trials.items()
        }
        for progress in self.progress.values():
            progress.update()
        self._live = live
        self._console = live.console if live else open_console(Screen())
        self._ended = list(finished)
        self._began = self._reported = time.monotonic()
        self._first = {name: (self._began, self.progress[name].step) for name in self.trials}

    def refresh(self) -> None:
        """Look at the trials that have not ended, and show them."""
        for name, status in self.status.items():
            if status not in OPEN:
                continue
            self.progress[name].update()
            running = is_held(lock_path(self.directory, name))
            self.status[name] = "running" if running else "waiting"
            if running and status == "waiting":
                step = self.progress[name].step
                self._first[name] = (time.monotonic(), step)
                if not self._live:  # the table shows it
                    self.message(f"{name}: running" + (f" from step {step}" if step else ""))
        self.show()

    def ended(self, name: str, outcome: str) -> None:
        self.progress[name].update()
        self.status[name] = outcome
        self._ended.append(name)
        text = f"{name}: {outcome}{self._figures(name)}"
        if outcome == "failed":
            text += f"  ({failure_path(self.directory, name).read_text().strip()})"
        self.message(text)

    def show(self) -> None:
        if self._live:
            rows = max(3, self._console.height - 8)
            self._live.update(self.table(rows), refresh=True)
        elif time.monotonic() - self._reported >= PLAIN_SECONDS:
            self._reported = time.monotonic()
            self.message(self.overview())
            for name in self._all("running"):
                self.message(f"  {name}{self._figures(name)}  eta {self._eta_of(name)}")

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def overview(self) -> str:
        counts = Counter(self.status.values())
        states = ", ".join(f"{count} {status}" for status, count in counts.items())
        text = f"{len(self.trials)} trials: {states}"
        is_open = counts["waiting"] + counts["running"]
        return f"{text}; eta {self._eta(list(self.trials), self._began)}" if is_open else text

    def table(self, rows: int) -> Table:
        """The trials that matter most: running and failed ones first, then the last that ended,
        then those that wait."""
        table = Table(box=SIMPLE, caption=self.overview())
        for name in ("trial", "status"):
            table.add_column(name, no_wrap=True)
        for name in ("step", "reward", "eval", "refreshes", "eta"):
            table.add_column(name, justify="right", no_wrap=True)
        urgent = [*self._all("running"), *self._all("failed")]
        order = dict.fromkeys([*urgent, *reversed(self._ended), *self.status])
        for name in list(order)[:rows]:
            status = self.status[name]
            eta = self._eta_of(name) if status == "running" else ""
            table.add_row(name, status, *self._cells(name).values(), eta)
        return table

    def _all(self, wanted: str) -> list[str]:
        return [name for name, status in self.status.items() if status == wanted]

    def _cells(self, name: str) -> dict[str, str]:
        progress = self.progress[name]
        return {
            "step": f"{progress.step}/{self.trials[name].config.steps}",
            "reward": "" if progress.reward is None else f"{progress.reward:.3f}",
            "eval": "" if progress.eval is None else f"{progress.eval:.3f}",
            "refreshes": "" if progress.refreshes is None else str(progress.refreshes),
        }

    def _figures(self, name: str) -> str:
        return "".join(f"  {key} {text}" for key, text in self._cells(name).items() if text)

    def _eta_of(self, name: str) -> str:
        return self._eta([name], self._first[name][0])

    def _eta(self, names: Sequence[str], since: float) -> str:
        """When all of these will have ended, at the pace at which they took steps since then."""
        taken = sum(self.progress[name].step - self._first[name][1] for name in names)
        if taken <= 0:
            return "unknown"
        going = [name for name in names if self.status[name] in OPEN]
        steps = sum(self.trials[name].config.steps - self.progress[name].step for name in going)
        seconds = int((time.monotonic() - since) / taken * steps)
        hours, minutes = divmod(seconds // 60, 60)
        return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds % 60:02}s"


@contextmanager
def build_view(
    directory: Path, trials: Sequence[Trial], finished: Mapping[str, str]
) -> Iterator[View]:
    if sys.stdout.isatty():
        with Live(console=open_console(Screen()), auto_refresh=False) as live:
            yield View(directory, trials, finished, live)
    else:
        view = View(directory, trials, finished)
        view.message(view.overview())
        yield view
