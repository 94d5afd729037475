"""What is damaged and read: a small world of real files, and the commands that read each."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import yaml
from forked import run
from fuzz.mutations import HOSTILE

TINY_LAB = [
    *("lab.hidden_size=16", "lab.layers=1", "lab.heads=2", "lab.intermediate_size=16"),
    *("lab.batches=2", "lab.rows=1", "lab.warmup_batches=1", "task.train=4", "task.test=2"),
    *("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_new_tokens=8"),
    *("eval.samples=2", "eval.every=1", "checkpoint.every=1", "checkpoint.keep=2"),
    *("schedule.min_isolation=1", "schedule.check_every=1", "schedule.window=1"),
]
_TINY_MODEL = ["eval.samples=1", "rollout.max_new_tokens=2", "rollout.max_prompt_tokens=2000"]
_ROWS = {
    "multiple_choice": {"prompt": "1+1?\nA: 2\nB: 3", "answer": "A"},
    "math": {"prompt": "1+1", "answer": "\\frac{4}{2}", "system": "3+4"},
    "tool_use": {"prompt": "1+1", "answer": [{"Action": "add", "Action_Input": {"a": 1}}]},
    "code": {"prompt": "1+1", "tests": [{"stdin": "1", "stdout": "1"}]},
}
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


_LOOK: Commands = (["report", "run"], ["replay", "run"], ["calibrate", "run", "--rate=0.1"])
_GO_ON: Commands = (["train", "--resume", "run"], ["fork", "run", "step=1", "out=new", "steps=1"])
_LOAD: Commands = (["export", "run", "new"], ["eval", "run", "eval.samples=1", "task.test=1"])
READERS = {
    "config.yaml": Reader(
        ("run",),
        ("run/config.yaml",),
        (*_LOOK, ["export", "run", "new"], ["train", "--resume", "run", "--dry-run"]),
    ),
    "metrics": Reader(("run",), ("run/metrics.jsonl",), (*_LOOK, *_GO_ON)),
    "events": Reader(("run",), ("run/events.jsonl",), (*_LOOK, *_GO_ON)),
    "summary": Reader(("run",), ("run/summary.json",), (*_LOOK[:1], *_GO_ON[:1])),
    "environment": Reader(("run",), ("run/environment.json",), (*_LOOK[:1], *_GO_ON[:1])),
    "checkpoint": Reader(("run",), ("run/checkpoints/*/**/*",), (*_GO_ON, *_LOAD)),
    "model": Reader(
        ("model",),
        ("model/*",),
        (
            ["eval", "model", "task.test=1", *_TINY_MODEL],
            ["eval", "model", "task.test=1", *_TINY_MODEL],
            ["plan", "base", "model.path=model"],
        ),
    ),
    "task rows": Reader(("model", "rows"), ("rows/*",), tuple(map(_task, _ROWS))),
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
OVERRIDES = "overrides"  # not files: texts of the command line


def random_overrides(rng: Random) -> list[str]:
    """A few `key=value` texts, keys and values of which may be anything."""
    from sodfast.config import load_config

    keys = [
        f"{group}.{key}"
        for group, values in load_config("lab", []).model_dump().items()
        for key in (values if isinstance(values, dict) else [None])
    ]
    texts = []
    for _ in range(rng.choice([1, 1, 2, 5])):
        key = rng.choice(keys).removesuffix(".None")
        value = rng.choice(HOSTILE)
        text = value if isinstance(value, str) else json.dumps(value)
        texts.append(rng.choice([f"{key}={text}", f"{key}='{text}'", f"{key}.x={text}", text]))
    return ["train", "lab", "--dry-run", *(text.replace("\0", "") for text in texts)]


def build_world(world: Path, say: Callable[[str], object] = print) -> None:
    """Real files of every kind. Raises `RuntimeError` where a command fails."""

    def command(*arguments: str) -> None:
        ended = run(list(arguments), world, cpu_seconds=120)
        if ended.code:
            raise RuntimeError(f"{arguments}: {ended.code}\n{ended.out}\n{ended.err}")

    (world / "outside").mkdir(parents=True)
    (world / "outside" / "canary.txt").write_text("nobody may write this\n")
    say("building real files")
    command("train", "lab", *TINY_LAB, "steps=1", "out=lab-run")
    command("export", "lab-run", "model")
    command("train", "lab", *TINY_LAB, "steps=3", "out=run", f"model.path={world / 'model'}")
    (world / "rows").mkdir()
    for name, row in _ROWS.items():
        for half in ("train", "test"):
            lines = [{**row, "id": f"{half}-{n}"} for n in range(3)]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (world / "rows" / f"{name}-{half}.jsonl").write_text(text)
    _build_study(world)
    (world / "layers").mkdir()
    above = {"base": "below.yaml", "steps": 3, "schedule": {"min_isolation": 4}}
    below = {"base": "lab", "task": {"train": 9}, "eval": {"every": 3, "samples": 2}}
    (world / "layers" / "above.yaml").write_text(yaml.safe_dump(above))
    (world / "layers" / "below.yaml").write_text(yaml.safe_dump(below))


def _build_study(world: Path) -> None:
    from synthetic import write_study

    study = {
        "base": "lab",
        "overrides": {"steps": 4, "eval": {"every": 2}},
        "axes": {"schedule": [{"kind": "hard", "every": 2}, {"kind": "cgtr"}], "seed": [0, 1]},
    }
    write_study(world / "study", study)
    (world / "sweep.yaml").write_text(yaml.safe_dump(study))
    (world / "study" / "base.yaml").write_text("base: lab\n")
    (world / "study" / "study.yaml").write_text(yaml.safe_dump({**study, "base": "base.yaml"}))
