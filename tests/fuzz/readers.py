"""Which files are damaged, which commands read each, and hostile texts of a command line."""

import json
from dataclasses import dataclass
from random import Random

from fuzz.mutations import HOSTILE
from fuzz.world import ANY_TASK, LAB_TASK, OWN, ROWS, TINY_LAB

_TINY_MODEL = ["eval.samples=1", "rollout.max_new_tokens=2", "rollout.max_prompt_tokens=2000"]
Commands = tuple[list[str], ...]


@dataclass(frozen=True)
class Reader:
    """`parts` of the world are copied, a file that matches one of `files` is damaged, and one of
    `commands` reads it."""

    parts: tuple[str, ...]
    files: tuple[str, ...]
    commands: Commands


def _task(name: str) -> list[str]:
    rows = [f"task.train=rows/{name}-train.jsonl", f"task.test=rows/{name}-test.jsonl"]
    more = ["task.options.isolation=rlimits"] if name == "code" else []
    return ["eval", "model", f"task.name={name}", *rows, *more, *_TINY_MODEL]


_LOOK: Commands = (
    *(["report", "run"], ["replay", "run"], ["calibrate", "run", "--rate=0.1"]),
    ["report", "run", "lab-run", "--out=both.html"],
)
_GO_ON: Commands = (["train", "--resume", "run"], ["fork", "run", "step=1", "out=new", "steps=1"])
_LOAD: Commands = (["export", "run", "new"], ["eval", "run", "eval.samples=1", "task.test=1"])
_BEST: Commands = (["export", "run", "new", "--best"], ["eval", "run", "--best"])
_SHOW: Commands = (
    *(["show", "run"], ["show", "run", "--eval", "--sort=reward"], ["show", "run", "--step=2"]),
    *(["show", "run", "--sort=divergence", "--limit=99"], ["report", "run"]),
)
_CHECKPOINT = "checkpoints/*/**/*"


def _kept(run: str) -> Reader:
    """The checkpoints of another kind of run."""
    resume = ["train", "--resume", run]
    fork = ["fork", run, "step=2", "out=new", "steps=3"]
    commands = (resume, fork, [*fork, "schedule.kind=hard"], ["export", run, "new"])
    return Reader((run, "code"), (f"{run}/{_CHECKPOINT}", f"{run}/metrics.jsonl"), commands)


READERS = {
    "config.yaml": Reader(
        ("run", "lab-run"),
        ("run/config.yaml",),
        (
            *_LOOK,
            *_SHOW[:1],
            ["export", "run", "new"],
            ["train", "--resume", "run", "--dry-run"],
            ["eval", "run", "eval.samples=1", "task.test=1"],
            ["fork", "run", "step=1", "out=new", "steps=1"],
        ),
    ),
    "metrics": Reader(("run", "lab-run"), ("run/metrics.jsonl",), (*_LOOK, *_GO_ON, *_BEST)),
    "events": Reader(("run", "lab-run"), ("run/events.jsonl",), (*_LOOK, *_GO_ON)),
    "samples": Reader(("run",), ("run/samples/*",), (*_SHOW, *_GO_ON)),
    "summary": Reader(("run", "lab-run"), ("run/summary.json",), (*_LOOK, *_GO_ON[:1], *_LOAD[:1])),
    "environment": Reader(
        ("run", "lab-run"), ("run/environment.json",), (*_LOOK, *_GO_ON[:1], *_LOAD[:1])
    ),
    "checkpoint": Reader(("run",), (f"run/{_CHECKPOINT}",), (*_GO_ON, *_LOAD)),
    "without hashes": _kept("old-run"),
    "evidence": _kept("evidence-run"),
    "own schedule": _kept("own-run"),
    "adapters": _kept("lora-run"),
    "locks": Reader(
        ("run", "study", "sweep.yaml"),
        ("run/.lock", "study/.lock", "study/logs/*"),
        (*_GO_ON, *_LOOK[:1], ["report", "study"]),
    ),
    "report": Reader(
        ("reported",),
        ("reported/report.html", "reported/tables/*", "reported/figures/*"),
        (["report", "reported"],),
    ),
    "begun fork": Reader(
        ("run", "begun"),
        ("begun/.forking", "begun/*", f"begun/{_CHECKPOINT}"),
        (
            ["fork", "run", "step=1", "out=begun", "steps=1"],
            ["train", "lab", *TINY_LAB, "steps=1", "out=begun"],
            ["train", "--resume", "begun"],
        ),
    ),
    "own code": Reader(
        ("own-run", "code", "cache"),
        ("code/*",),
        (
            ["train", "--resume", "own-run", "steps=4"],
            ["train", "lab", *ANY_TASK, *OWN, "steps=1", "out=new"],
            ["eval", "own-run"],
            ["report", "own-run"],
            ["replay", "own-run"],
        ),
    ),
    "model": Reader(
        ("model",),
        ("model/*",),
        (
            ["eval", "model", "task.test=1", *_TINY_MODEL],
            ["eval", "model", "task.test=1", *_TINY_MODEL],
            ["plan", "base", "model.path=model"],
        ),
    ),
    "task rows": Reader(("model", "rows"), ("rows/*",), tuple(map(_task, ROWS))),
    "study": Reader(
        ("study", "sweep.yaml"),
        ("study/study.yaml", "study/base.yaml", "sweep.yaml", "study/runs/*/*"),
        (["report", "study"], ["sweep", "sweep.yaml", "out=new", "device=cuda:0"]),
    ),
    "layers": Reader(
        ("layers",),
        ("layers/*.yaml",),
        (
            ["train", "layers/above.yaml", "--dry-run"],
            ["train", "layers/above.yaml", "schedule.kind=ema", "--dry-run"],
        ),
    ),
    "warm start": Reader(
        ("cache",),
        ("cache/**/*",),
        (["train", "lab", *TINY_LAB, "steps=1", "out=new"],),
    ),
}
_KINDS = [
    [],
    *([f"schedule.kind={kind}"] for kind in ("fixed", "hard", "ema", "trust_region", "evidence")),
    ["model.lora.rank=2"],
    ["teacher.context=none", "teacher.storage=host"],
    ["teacher.context=feedback"],
    ["optimizer.lr_burst={first: 1, last: 2, factor: 2.0}"],
]
_ODD = [
    *("0", "1", "2", "3", "-1", "0.5", "1.0", "1e-300", "1e-30", "1e30", "1e300", "true", "false"),
    *("null", "[]", "{}", "''", "x", "[0, 0]", "[1, 1]", "[x]", "9223372036854775807"),
]
# Keys under which a run may rightly take long, or more memory than there is.
_COSTLY = ("lab.", "steps", "rollout.max_new_tokens", "out", "threads", "eval.samples")


def random_overrides(rng: Random) -> list[str]:
    """A few `key=value` texts, keys and values of which may be anything."""
    kind = rng.choice(_KINDS)
    texts = []
    for _ in range(rng.choice([1, 1, 2, 5])):
        key, value = rng.choice(_keys(kind)), rng.choice(HOSTILE)
        text = value if isinstance(value, str) else json.dumps(value)
        texts.append(rng.choice([f"{key}={text}", f"{key}='{text}'", f"{key}.x={text}", text]))
    return ["train", "lab", "--dry-run", *kind, *(text.replace("\0", "") for text in texts)]


def random_values(rng: Random) -> list[str]:
    """A run of one step, a key or two of which have values that may be at an edge."""
    kind = rng.choice(_KINDS)
    keys = [key for key in _keys(kind) if not key.startswith(_COSTLY)]
    texts = [f"{rng.choice(keys)}={rng.choice(_ODD)}" for _ in range(rng.choice([1, 1, 2]))]
    lab = [*ANY_TASK, *LAB_TASK]
    return ["train", "lab", *lab, "steps=1", "out=new", *kind, *texts]


def _keys(kind: list[str]) -> list[str]:
    """Every key there is under those overrides, groups and what is in them."""
    from sodfast.config import load_config
    from sodfast.study.definition import flatten

    values = load_config("lab", kind).model_dump()
    return sorted({*values, *flatten(values)})


# What is no file: texts of the command line.
TEXTS = {"overrides": random_overrides, "values": random_values}
