"""The targets of the suite, judged from the parts' JSON: `python bench/suite_targets.py FOLDER`.

A target is met, a MISS, or not run. It is a MISS too where a case failed, or where a peer that is
expected has no time; a peer that is not expected was named in `--without` of the command that ran
the part.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]

# Linear form at 8,192 rows: times the fair floor, at most.
FLOORS = {
    "KL": {"ours": 1.14, "ours, top-20 + tail": 1.13, "ours, top-100 + tail": 1.13},
    "JSD": {"ours": 1.15, "ours, top-20 + tail": 1.13, "ours, top-100 + tail": 1.13},
}
TRL_RATIO = {"KL": 1.4, "JSD": 1.8}
EXTRA_BYTES = 3.5e9
# Shares of a copy's bandwidth, at least. The JSD over bf16 logits is bound by its instructions:
# bench/results/compiled.md predicts 62 % for it on an H200; everything else is bound by bytes.
LOGIT_SHARES = {("bfloat16", "JSD"): 0.60}
OTHER_LOGIT_SHARE = 0.80
PARAMETER_SHARES = {
    "copy": 0.9,
    "average": 0.8,
    "adamw fp32": 0.8,
    "adamw exact": 0.8,
    "adamw 8bit": 0.5,
}
HOST_MILLISECONDS = 0.5
# Sampling is bound by the noise: about 50 instructions a logit, whatever the logit's bytes.
SAMPLING_SHARES = {"bfloat16": 0.2, "float32": 0.4}
# Our case, the peer to beat, and how many times faster at least.
SAMPLING_PEERS = [
    ("ours", "softmax and multinomial", 2.0),
    ("ours, top-p", "sort, top-p", 5.0),
    ("ours", "flashinfer: sampling", 1.0),
    ("ours, top-p", "flashinfer: top-p", 1.0),
]
# Of the seconds of a rollout without drafts, at most, by the best number of drafts.
DRAFTS_SHARE = 0.7


# In the order of the table.
VERDICTS = ("MISS", "not run", "skipped", "pass")


class Target(NamedTuple):
    """value: None where there is none, for the reason `why`; `absent` is the verdict then."""

    part: str
    name: str
    value: float | None
    limit: float
    at_most: bool = True
    why: str = ""
    absent: str = "MISS"

    @property
    def verdict(self) -> str:
        if self.value is None:
            return self.absent
        met = self.value <= self.limit if self.at_most else self.value >= self.limit
        return "pass" if met else "MISS"

    def line(self) -> list[str]:
        value = self.why if self.value is None else f"{self.value:.4g}"
        sign = "≤" if self.at_most else "≥"
        return [self.verdict, self.part, self.name, value, f"{sign} {self.limit:g}"]


class Cases:
    """A part's results, and the targets that a number in a row of them gives."""

    def __init__(self, part: str, content: Row) -> None:
        self.part, self.content = part, content

    def rows(self, case: str) -> dict[str, Row]:
        found = self.content["cases"].get(case, {}).get("rows", [])
        return {row["name"]: row for row in found}

    def target(
        self, name: str, value: float | None, limit: float, at_most: bool, case: str, row: str = ""
    ) -> Target:
        """value: None where the case or the row has no such number."""
        if value is not None:
            return Target(self.part, name, value, limit, at_most)
        return Target(self.part, name, None, limit, at_most, *self.why(case, row))

    def why(self, case: str, row: str) -> tuple[str, str]:
        """Why a number is absent, and the verdict on that."""
        result = self.content["cases"].get(case)
        if result is None:
            return self.content["not_run"].get(case, "not asked for"), "not run"
        if "failed" in result:
            return str(result["failed"]), "MISS"
        return self.why_row(row, self.rows(case).get(row, {}))

    def why_row(self, name: str, row: Row) -> tuple[str, str]:
        peer = name.partition(":")[0].lower()
        if peer in self.content["without"]:
            return f"without {peer}", "skipped"
        return str(row.get("failed", f"no row {name!r}")), "MISS"

    def of_row(
        self, name: str, case: str, row: str, key: str, limit: float, at_most: bool
    ) -> Target:
        return self.target(name, self.rows(case).get(row, {}).get(key), limit, at_most, case, row)

    def ratio(self, name: str, case: str, slow: str, fast: str, least: float) -> Target:
        """How many times longer the row `slow` takes than the row `fast`."""
        rows = self.rows(case)
        times = [rows.get(row, {}).get("milliseconds") for row in (slow, fast)]
        value = None if None in times else times[0] / times[1]
        row = slow if times[0] is None else fast
        return self.target(name, value, least, False, case, row)


def objective(cases: Cases) -> Iterator[Target]:
    for kind, floors in FLOORS.items():
        case = f"8192 rows, {kind}"
        for row, limit in floors.items():
            yield cases.of_row(
                f"{case}: {row}: times the floor", case, row, "times_the_floor", limit, True
            )
        yield cases.of_row(
            f"{case}: ours: extra bytes", case, "ours", "extra_bytes", EXTRA_BYTES, True
        )
        yield cases.ratio(f"{case}: full over frozen head", case, "ours", "ours, frozen head", 1.0)
        trl = "TRL: chunked divergence"
        yield cases.ratio(f"{case}: times as fast as TRL", case, trl, "ours", TRL_RATIO[kind])
    fla = "fla: fused KL"
    yield cases.ratio("8192 rows, KL: times as fast as fla", "8192 rows, KL", fla, "ours", 1.0)
    for rows in (1024, 4096, 8192, 16_384):
        for kind in FLOORS:
            case = f"{rows} rows, {kind}"
            for liger in ("Liger: fused_linear_jsd", "Liger: chunked_loss JSD"):
                yield cases.ratio(f"{case}: times as fast as {liger}", case, liger, "ours", 1.0)


def logits(cases: Cases) -> Iterator[Target]:
    for case in ("bfloat16", "float32"):
        for row in ("KL", "JSD", "top-20 + tail", "top-100 + tail"):
            least = LOGIT_SHARES.get((case, row), OTHER_LOGIT_SHARE)
            name = f"{case} logits, {row}: share of a copy"
            yield cases.of_row(name, case, row, "share_of_copy_bandwidth", least, False)


def parameters(cases: Cases) -> Iterator[Target]:
    group_of = {"copy": "teacher", "average": "teacher", "adamw 8bit": "AdamW, 8-bit moments"}
    for row, least in PARAMETER_SHARES.items():
        case = group_of.get(row, "AdamW, wider moments")
        name = f"{row}: share of a copy"
        yield cases.of_row(name, case, row, "share_of_copy_bandwidth", least, False)
        name = f"{row}, 399 tensors: host milliseconds"
        yield cases.of_row(name, "host", row, "host_milliseconds", HOST_MILLISECONDS, True)
    case, torchao = "AdamW, 8-bit moments", "torchao: AdamW8bit (no norm)"
    yield cases.ratio("adamw 8bit: times as fast as torchao", case, torchao, "adamw 8bit", 1.0)


def sampling(cases: Cases) -> Iterator[Target]:
    for dtype, least in SAMPLING_SHARES.items():
        case = f"64 rows, {dtype}"
        yield cases.of_row(
            f"{case}: ours: share of a copy", case, "ours", "share_of_copy_bandwidth", least, False
        )
        for ours, peer, ratio in SAMPLING_PEERS:
            yield cases.ratio(f"{case}: {ours}: times as fast as {peer}", case, peer, ours, ratio)


def checks(cases: Cases) -> Iterator[Target]:
    """What the cases judge themselves, and those that have no result."""
    for case, result in cases.content["cases"].items():
        if "failed" in result:
            yield Target(cases.part, case, None, 0.0, why=result["failed"])
        if "skipped" in result:
            yield Target(cases.part, case, None, 0.0, why=result["skipped"], absent="skipped")
        for row in result.get("checks", []):
            name = f"{case}: {row['check']}"
            yield Target(cases.part, name, row["value"], row["limit"], row["at_most"])
    for case, reason in cases.content["not_run"].items():
        yield Target(cases.part, case, None, 0.0, why=reason, absent="not run")


def peers_beside(cases: Cases) -> Iterator[Target]:
    """Part correctness: the figure has a point of every peer that is expected."""
    for case, result in cases.content["cases"].items():
        for row in result.get("rows", []):
            if ":" in row["name"]:
                name = f"{case}: {row['name']} at {row['divergence']:.1g}"
                if "d_head" in row:
                    yield Target(cases.part, name, row["d_head"], 2.0)
                else:
                    reason = cases.why_row(row["name"], row)
                    yield Target(cases.part, name, None, 2.0, True, *reason)


def drafts(cases: Cases) -> Iterator[Target]:
    """Part 8b_speculation: each case is a number of drafts, `off` none."""
    times = {
        case: row["milliseconds"]
        for case in cases.content["cases"]
        for row in cases.rows(case).values()
    }
    off = times.pop("off", None)
    best = min(times.values(), default=None)
    share = None if off is None or best is None else best / off
    absent = "off" if off is None else "3 drafts"
    name = "the best number of drafts: over off"
    yield cases.target(name, share, DRAFTS_SHARE, True, absent)


OF_PART = {
    "correctness": peers_beside,
    "objective": objective,
    "logits": logits,
    "parameters": parameters,
    "sampling": sampling,
    "8b_speculation": drafts,
}


def judge(folder: Path, parts: list[str]) -> list[Target]:
    """The targets of every part that has a JSON in the folder. A rehearsal's times mean nothing,
    so of its parts only what they check themselves is judged."""
    found: list[Target] = []
    for part in parts:
        path = folder / f"{part}.json"
        if not path.exists():
            continue
        cases = Cases(part, json.loads(path.read_text()))
        found += checks(cases)
        if part in OF_PART and cases.content["versions"]["full_sizes"]:
            found += OF_PART[part](cases)
    return found


def table(targets: list[Target]) -> str:
    """In Markdown, misses first."""
    rows = [t.line() for t in sorted(targets, key=lambda t: VERDICTS.index(t.verdict))]
    head = ["", "part", "target", "value", "limit"]
    lines = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines]) + "\n"


if __name__ == "__main__":
    place = Path(sys.argv[1])
    print(table(judge(place, [path.stem for path in sorted(place.glob("*.json"))])))
