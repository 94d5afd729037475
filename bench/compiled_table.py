"""What compiling showed last: bench/results/compiled.json and its table, compared and renewed."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
GROWTH = 1.05
# Of the row kernels on our own tiles: instructions and bytes an element, and the programs that must
# fit on a multiprocessor.
TARGETS = {
    "full_forward_fp32": (55, 18),
    "full_reverse_fp32": (55, 18),
    "full_jsd_fp32": (92, 19),
    "full_jsd_bf16": (93, 15),  # 90 in two sweeps, and a third one for one row in ten
    "top_20_jsd_fp32": (45, 15),
    "top_100_jsd_fp32": (55, 16.5),
}
LEAST_PROGRAMS = 4
COLUMNS = (
    "kernel",
    "arch",
    "registers",
    "programs, warps",
    "instructions (before)",
    "bytes",
    "prediction",
)


def missed_targets(report: dict[str, Any]) -> list[str]:
    """Which targets of a kernel its report misses, on an H100 or H200."""
    target = TARGETS.get(report["name"])
    if target is None or report["arch"] != "sm_90":
        return []
    checks = {
        f"{report['instructions']} instructions an element, {target[0]} at most": (
            report["instructions"] <= target[0]
        ),
        f"{report['bytes']} bytes an element, {target[1]} at most": report["bytes"] <= target[1],
        f"{report['programs']} programs at once, {LEAST_PROGRAMS} at least": (
            report["programs"] >= LEAST_PROGRAMS
        ),
    }
    return [text for text, holds in checks.items() if not holds]


def load() -> dict[str, Any]:
    """The committed counts: {"triton": version, "kernels": {"name sm_90": report}}."""
    path = FOLDER / "compiled.json"
    return json.loads(path.read_text()) if path.is_file() else {"triton": "", "kernels": {}}


def grown(report: dict[str, Any], version: str) -> list[str]:
    """How a report is worse than the committed one; nothing is compared across versions of Triton,
    each of which generates other code."""
    committed = load()
    before = committed["kernels"].get(f"{report['name']} {report['arch']}")
    if committed["triton"] != version:
        return []
    if before is None:
        return ["not in bench/results/compiled.json: run compile_report.py --update"]
    now, then = report.get("instructions", 0), before.get("instructions", 0)
    if now > GROWTH * then:
        return [f"{now} instructions an element, {then} in bench/results/compiled.json"]
    return []


def update(reports: list[dict[str, Any]], version: str) -> None:
    """Writes the counts, each with the instructions before its last change, and the table."""
    kernels = load()["kernels"]
    for report in reports:
        key = f"{report['name']} {report['arch']}"
        old = kernels.get(key, {})
        report = dict(report)
        if "instructions" in report:
            changed = old.get("instructions") not in (None, report["instructions"])
            report["before"] = old["instructions"] if changed else old.get("before")
        kernels[key] = report
    kernels = dict(sorted(kernels.items()))
    text = json.dumps({"triton": version, "kernels": kernels}, indent=1)
    (FOLDER / "compiled.json").write_text(text + "\n")
    (FOLDER / "compiled.md").write_text(table(kernels, version))


def table(kernels: dict[str, dict[str, Any]], version: str) -> str:
    """Markdown: a row for each kernel with sweeps, and the model's prediction for each GPU."""
    lines = [
        "# What compiling shows",
        "",
        f"Written by `python bench/compile_report.py --update`, Triton {version}. Nothing here",
        "was measured on a GPU: instructions and bytes an element are counted in the machine code,",
        "times and shares of the copy bandwidth follow from the model in `bench/predict.py`.",
        "*Products*: linear layer and divergence with all gradients at N = 8,192, V = 151,936,",
        "H = 4,096, over four products alone.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for report in kernels.values():
        if "instructions" not in report:
            continue
        loops = " + ".join(map(str, report["instructions_of_loops"].values()))
        before = "" if report.get("before") is None else f" ({report['before']})"
        predicted = "; ".join(
            f"{gpu} {entry['picoseconds']} ps, {entry['share']:.0%}"
            + (
                f", products × {entry['over_the_products']}"
                if _has_products(report["name"])
                else ""
            )
            for gpu, entry in report["predicted"].items()
        )
        lines.append(
            f"| {report['name']} | {report['arch']} | {report['registers']} "
            f"| {report.get('programs', '')}, {report.get('warps', '')} "
            f"| {loops} → **{report['instructions']}**{before} | {report['bytes']} | {predicted} |"
        )
    return "\n".join(lines) + "\n"


def _has_products(name: str) -> bool:
    return name.startswith(("full", "top", "stored")) and name.endswith("_fp32")
