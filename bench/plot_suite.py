"""Plots of the suite's JSON: `python bench/plot_suite.py FOLDER`; gpu_suite.py draws them itself.

accuracy.svg and .png: the relative error of the head's gradient over the true divergence, ours
beside the peers'. times.svg and .png: forward and backward over the number of rows.
"""

import json
import sys
from pathlib import Path
from typing import Any

KINDS = ("KL", "JSD")
# Ours is drawn strongest, what is no peer weakest.
OURS, BASELINES = "ours", ("eager", "torch.compile", "four products")
Series = dict[str, list[tuple[float, float]]]


def cases(folder: Path, part: str) -> dict[str, Any]:
    path = folder / f"{part}.json"
    return json.loads(path.read_text())["cases"] if path.exists() else {}


def accuracy(folder: Path, kind: str) -> Series:
    """name → (true divergence in nats, error of d_head), ascending."""
    found: Series = {}
    for row in cases(folder, "correctness").get(f"accuracy, {kind}", {}).get("rows", []):
        if "d_head" in row:
            found.setdefault(row["name"], []).append((row["divergence"], row["d_head"]))
    return {name: sorted(points) for name, points in found.items()}


def times(folder: Path, kind: str) -> Series:
    """name → (rows, milliseconds), ascending."""
    found: Series = {}
    for name, case in cases(folder, "objective").items():
        if name.endswith(f"rows, {kind}"):
            for row in case.get("rows", []):
                if "milliseconds" in row:
                    point = (row["rows"], row["milliseconds"])
                    found.setdefault(row["name"], []).append(point)
    return {name: sorted(points) for name, points in found.items()}


def draw(folder: Path) -> list[Path]:
    """Writes what there is something to draw of, and says which files."""
    written: list[Path] = []
    for name, series, xlabel, ylabel in (
        ("accuracy", accuracy, "true forward KL, nats", "relative error of the head's gradient"),
        ("times", times, "rows", "ms, forward and backward"),
    ):
        found = {kind: series(folder, kind) for kind in KINDS}
        if any(found.values()):
            written += panels(folder / name, found, xlabel, ylabel)
    return written


def panels(path: Path, found: dict[str, Series], xlabel: str, ylabel: str) -> list[Path]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4))
    axes = figure.subplots(1, len(found), sharey=True)
    names = sorted({name for series in found.values() for name in series})
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    for axis, (kind, series) in zip(axes, found.items(), strict=True):
        for name, points in series.items():
            axis.loglog(
                *zip(*points, strict=True),
                color=colours[name],
                marker="o",
                markersize=4,
                linewidth=2.5 if name == OURS else 1.2,
                linestyle="--" if name in BASELINES else "-",
                label=name,
            )
        axis.set(title=kind, xlabel=xlabel)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0].set_ylabel(ylabel)
    files = [path.with_suffix(suffix) for suffix in (".svg", ".png")]
    # The same bytes for the same figures: no date, and ids that are no random numbers.
    with rc_context({"svg.hashsalt": path.name}):
        figure.savefig(files[0], bbox_inches="tight", metadata={"Date": None})
    figure.savefig(files[1], dpi=150, bbox_inches="tight")
    return files


if __name__ == "__main__":
    for file in draw(Path(sys.argv[1])):
        print(file)
