"""Data, figures and numbers of docs/when_should_the_teacher_move.md, and of the README's few
sentences of it, from study directories.

    python bench/teacher_map.py studies/B3 studies/A --forks studies/forks_B3

Each study is a regime under the name of its directory. The report of them all is computed as
`sodfast report … --out` does; its CSVs and figures that the page needs go to the page's folder, and
what stands between <!-- NAME --> and <!-- end --> is written anew from these CSVs.
Without studies only the last is done. Everything said with an interval stands between such marks.
"""

import argparse
import csv
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from sodfast.errors import UsageError
from sodfast.files import copy_files, to_csv
from sodfast.report.intervals import (
    difference_of,
    from_the_highest,
    mean_and_error,
    mean_of,
    wilson_interval,
)
from sodfast.report.page import write_studies
from sodfast.report.tables import difference_row
from sodfast.report.templates import number, template
from sodfast.run.environment import describe
from sodfast.summary import NEXT_STEPS

ROOT = Path(__file__).parent.parent
PAGE, README = ROOT / "docs" / "when_should_the_teacher_move.md", ROOT / "README.md"
SCHEDULES = (
    *("tables/runs.csv", "tables/results.csv", "tables/comparisons.csv", "tables/attribution.csv"),
    *("tables/forecast.csv", "tables/curve_score.csv", "tables/curve_length.csv"),
    *("figures/phase.svg", "figures/attribution.svg"),
)
EARLIER, SHIPPED = PAGE.parent / "schedules_lab" / "tables", "shipped, 23 November"
FORKS = ("tables/forks.csv", "tables/effects.csv", "figures/forks.svg")
ABSENT = "Not measured yet."

Row = Mapping[str, Any]
Data = Mapping[str, Sequence[Row]]  # the CSVs by name


def collect(studies: Sequence[Path], names: Sequence[str], folder: Path) -> None:
    """Copy these files of the studies' report into `folder`, but for a figure that there is not.

    made_NAME.csv says of each study NAME on what machine, with which versions and at which commit
    how many of its runs were made.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = write_studies(studies, Path(scratch)).parent
        folder.mkdir(exist_ok=True)
        for name in names:
            if (report / name).exists():
                shutil.copyfile(report / name, folder / Path(name).name)
    for study in studies:
        made = Counter(filter(None, map(describe, sorted((study / "runs").iterdir()))))
        rows = [("study", "runs", "environment")]
        rows += [(study.name, count, text) for text, count in made.items()]
        (folder / f"made_{study.name}.csv").write_text(to_csv(rows))


def read(folder: Path) -> Data:
    """Every CSV of the folder by its name: numbers and truth values as such, empty cells None."""
    return {
        file.stem: [
            {key: _value(cell) for key, cell in row.items()}
            for row in csv.DictReader(file.open(newline=""))
        ]
        for file in sorted(folder.glob("*.csv"))
    }


def with_earlier(data: Data, folder: Path = EARLIER) -> Data:
    """With the runs and the comparisons of docs/schedules_lab, a regime of its own."""
    earlier = read(folder)
    names = {"regime": SHIPPED, "lab_seed": 0}
    runs = [
        {**row, **names, "schedule": row["group"], "collapsed": int(bool(row["collapse_step"]))}
        for row in earlier["runs"]
    ]
    finals: dict[str, dict[Any, float]] = {}
    for row in earlier["runs"]:
        finals.setdefault(row["group"], {})[row["seed"]] = row["final"]
    highest, others = from_the_highest(finals)
    comparisons = [
        {"regime": SHIPPED, "highest": highest, "other": other, **difference_row(found)}
        for other, found in others
    ]
    more = {"runs": runs, "comparisons": comparisons}
    return {**data, **{name: [*data.get(name, ()), *rows] for name, rows in more.items()}}


def _value(cell: str) -> Any:
    if cell in ("True", "False"):
        return cell == "True"
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell or None


# ---------------------------------------------------------------- what stands between the marks


def answers(data: Data) -> str:
    """First where CGTR and our own schedule lead, then each regime's answer."""
    words: Any = template("findings.html.j2").module
    regimes = _by_regime(data)
    leads = [_leads(schedule, regimes) for schedule in ("CGTR", "evidence")]
    return "\n\n".join([*leads, _bullets([words.of_schedules(rows) for rows in regimes.values()])])


def summary(data: Data) -> str:
    """The README's: where CGTR and our own schedule lead, and the first regime with intervals, with
    the figure once that is one of this page's own."""
    words: Any = template("findings.html.j2").module
    regimes = _by_regime(data)
    leads = [_leads(schedule, regimes) for schedule in ("CGTR", "evidence")]
    first = next(name for name, rows in regimes.items() if _has_intervals(rows))
    sentences = " ".join([*leads, _line(words.of_schedules(regimes[first]))])
    figure = "" if first == SHIPPED else f"{_phase(f'docs/{PAGE.stem}')}\n\n"
    return figure + "\n".join(wrap(sentences, 100, break_long_words=False))


def _has_intervals(rows: Sequence[Row]) -> bool:
    return any(row["difference_low"] is not None for row in rows)


def _by_regime(data: Data) -> dict[str, list[Row]]:
    regimes: dict[str, list[Row]] = {}
    for row in data["comparisons"]:
        regimes.setdefault(row["regime"], []).append(row)
    return regimes


def _leads(schedule: str, regimes: Mapping[str, Sequence[Row]]) -> str:
    """In which of the regimes that it was measured in every interval puts it above the others."""
    measured = {
        name: rows
        for name, rows in regimes.items()
        if schedule in (rows[0]["highest"], *(row["other"] for row in rows))
        and _has_intervals(rows)
    }
    led = [
        name
        for name, rows in measured.items()
        if rows[0]["highest"] == schedule and all((row["difference_low"] or 0) > 0 for row in rows)
    ]
    if not measured:
        return f"`{schedule}` has not been measured over several seeds in any regime."
    names = f": {'; '.join(led)}" if led else ""
    count = f"{len(led)} of {len(measured)} regime{'s' if len(measured) > 1 else ''}"
    return f"`{schedule}` ends above every other schedule in {count} with several seeds{names}."


def forks(data: Data) -> str:
    words: Any = template("findings.html.j2").module
    found = [words.of_forks(row, NEXT_STEPS) for row in data["effects"] if row["by"] == "all"]
    figure = image("forks", "Effect of one refresh by step, age, drift and tail")
    return f"{_bullets(found)}\n\n{figure}\n\n{table('effects', data['effects'])}"


def schedules(data: Data) -> str:
    return f"{_phase()}\n\n{table('results', data['results'])}"


def starts(data: Data) -> str:
    """Regime and warm start × schedule: final score and length of the answers over the runs."""
    runs = [row for row in _ended(data) if row.get("length") is not None]
    names = list(dict.fromkeys(row["schedule"] for row in runs))
    lines = [["regime, warm start", *names], ["---"] * (1 + len(names))]
    for place in dict.fromkeys((row["regime"], row["lab_seed"]) for row in runs):
        own = [row for row in runs if (row["regime"], row["lab_seed"]) == place]
        cells = [_ends([row for row in own if row["schedule"] == name]) for name in names]
        lines.append([f"{place[0]}, {place[1]}", *cells])
    return _markdown(lines)


def _ends(runs: Sequence[Row]) -> str:
    final = mean_and_error([row["final"] for row in runs])
    length = mean_of(row["length"] for row in runs)
    if final is None or length is None:
        return "–"
    error = "" if final.error is None else f" ± {number(final.error)}"
    return f"{number(final.value)}{error}, {number(length, 0)} tokens ({final.n})"


def attribution(data: Data) -> str:
    found = table("attribution", data["attribution"])
    if not any(row["judged"] for row in data["attribution"]):
        return found
    return f"{image('attribution', 'Effect of each refresh beside its trend')}\n\n{found}"


def _phase(folder: str = PAGE.stem) -> str:
    return image("phase", "Mean final score of each schedule in each regime, and collapses", folder)


def image(name: str, text: str, folder: str = PAGE.stem) -> str:
    return f"![{text}]({folder}/{name}.svg)"


def table(name: str, rows: Sequence[Row]) -> str:
    """A table of the report in Markdown."""
    columns = vars(template("tables.html.j2").module)["columns"][name]
    lines = [[head for head, *_ in columns], ["---"] * len(columns)]
    lines += [[_line(write(row, *more)) for _, write, *more in columns] for row in rows]
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _ended(data: Data) -> list[Row]:
    return [row for row in data["runs"] if row["status"] in ("done", "collapsed")]


def _bullets(sentences: Sequence[object]) -> str:
    return "\n".join(f"* {_line(sentence)}" for sentence in sentences) or ABSENT


def _line(text: object) -> str:
    """A report's sentence or cell in one line of Markdown."""
    return " ".join(re.sub("</?strong>", "**", str(text)).split())


# The paper's claims: what it found, and the difference of final scores or the schedule whose
# collapses decide it here.
CLAIMS: tuple[tuple[str, str, str | None], ...] = (
    ("M = 1 collapses (at step 10)", "hard, every 1", None),
    ("M = 50 collapses within 300 steps (two tasks of four)", "hard, every 50", None),
    ("M = 50 ends above M = 10 (.755 and .669)", "hard, every 50", "hard, every 10"),
    ("M = 50 ends above fixed (.755 and .697)", "hard, every 50", "fixed"),
    ("M = 50 ends above EMA .04 at 100 steps (.755 and .713)", "hard, every 50", "EMA 0.04"),
    ("CGTR ends above EMA .04 at 300 steps (four tasks of four)", "CGTR", "EMA 0.04"),
    ("CGTR ends above M = 50 at 300 steps (four tasks of four)", "CGTR", "hard, every 50"),
    ("not a claim of the paper: CGTR ends above fixed", "CGTR", "fixed"),
    ("not a claim of the paper: evidence ends above CGTR", "evidence", "CGTR"),
)


def claims(data: Data) -> str:
    """A row per claim, a column per regime."""
    runs = _ended(data)
    regimes = list(dict.fromkeys(row["regime"] for row in runs))
    lines = [["claim", *regimes], ["---"] * (1 + len(regimes))]
    for text, schedule, other in CLAIMS:
        cells = [
            _collapses(runs, regime, schedule)
            if other is None
            else _difference(runs, regime, schedule, other)
            for regime in regimes
        ]
        lines.append([text, *cells])
    return _markdown(lines)


def _of(runs: Sequence[Row], regime: str, schedule: str) -> dict[tuple[int, int], Row]:
    rows = [row for row in runs if (row["regime"], row["schedule"]) == (regime, schedule)]
    return {(row["lab_seed"], row["seed"]): row for row in rows}


def _collapses(runs: Sequence[Row], regime: str, schedule: str) -> str:
    own = _of(runs, regime, schedule).values()
    if len(own) < 2:
        return "not measured"
    lost = sum(row["collapsed"] for row in own)
    low, high = wilson_interval(lost, len(own))
    word = "in most runs" if low > 0.5 else "not in most runs" if high < 0.5 else "cannot tell"
    return f"{word}: {lost} of {len(own)} [{number(low, 2)}, {number(high, 2)}]"


def _difference(runs: Sequence[Row], regime: str, schedule: str, other: str) -> str:
    own, its = (_of(runs, regime, name) for name in (schedule, other))
    found = difference_of(
        *({key: row["final"] for key, row in rows.items()} for rows in (own, its))
    )
    if found is None or found.interval is None:
        return "not measured"
    low, high = found.interval
    word = "holds" if low > 0 else "the reverse holds" if high < 0 else "cannot tell"
    ends = f"[{number(low, sign=True)}, {number(high, sign=True)}]"
    return f"{word}: {number(found.mean, sign=True)} {ends}, {found.n} pairs"


def sources(data: Data) -> str:
    """What the numbers are over."""
    lines = []
    for regime in dict.fromkeys(row["regime"] for row in data["runs"]):
        own = [row for row in data["runs"] if row["regime"] == regime]
        ended = [row for row in own if row["status"] in ("done", "collapsed")]
        seeds = {(row["lab_seed"], row["seed"]) for row in ended}
        labs = {row["lab_seed"] for row in ended}
        steps = max(row["steps"] for row in own)
        lines.append(
            f"{regime}: {len(ended)} of {len(own)} runs have finished, of {steps} steps, over "
            f"{len(seeds)} seeds on {len(labs)} warm start{'s' if len(labs) != 1 else ''}."
        )
    made = [row for name, rows in data.items() if name.startswith("made_") for row in rows]
    lines += [f"{row['study']}, {row['runs']} runs: {row['environment']}." for row in made]
    return _bullets(lines)


BLOCKS: dict[str, tuple[str, Callable[[Data], str]]] = {  # mark → the CSV it needs, what writes it
    "sources": ("runs", sources),
    "summary": ("comparisons", summary),
    "answers": ("comparisons", answers),
    "schedules": ("results", schedules),
    "starts": ("runs", starts),
    "claims": ("runs", claims),
    "attribution": ("attribution", attribution),
    "warnings": ("forecast", lambda data: table("forecast", data["forecast"])),
    "forks": ("effects", forks),
}
MARKED = re.compile(r"(<!-- ([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, data: Data) -> str:
    """The page with what stands between its marks as the CSVs say."""

    def block(found: re.Match[str]) -> str:
        needs, write = BLOCKS[found[2]]
        return f"{found[1]}\n{write(data) if data.get(needs) else ABSENT}\n\n{found[3]}"

    return MARKED.sub(block, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("studies", nargs="*", type=Path)
    parser.add_argument("--forks", nargs="*", type=Path, default=[])
    arguments = parser.parse_args()
    folder = PAGE.with_suffix("")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for studies, names in ((arguments.studies, SCHEDULES), (arguments.forks, FORKS)):
                if studies:
                    collect(studies, names, Path(scratch))
        except UsageError as error:
            parser.exit(2, f"teacher_map: {error}\n")
        # Only now, so that a study that cannot be used leaves the page's data as they are.
        copy_files(Path(scratch), folder, os.listdir(scratch))
    for page in (PAGE, README):
        page.write_text(fill(page.read_text(), with_earlier(read(folder))))


if __name__ == "__main__":
    main()
