"""What is damaged and read: a small world of real files, and the commands that read each."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import forked
import yaml
from fuzz.mutations import HOSTILE

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_LAB = [
    *("lab.hidden_size=16", "lab.layers=1", "lab.heads=2", "lab.intermediate_size=16"),
    *("lab.batches=2", "lab.rows=1", "lab.warmup_batches=1", "task.train=4", "task.test=2"),
    *("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_new_tokens=8"),
    *("eval.samples=2", "eval.every=1", "checkpoint.every=1", "checkpoint.keep=2"),
    *("schedule.min_isolation=1", "schedule.check_every=1", "schedule.window=1"),
]
_ANY_TASK = [text for text in TINY_LAB if not text.startswith(("task.", "schedule."))]
_LAB_TASK = ["task.train=4", "task.test=2"]
_OWN = [  # the user's code
    *("task.name=python", "task.source=code/arithmetic_task.py:Arithmetic"),
    *("task.options={train: 4, test: 2}", "schedule.options.patience=1"),
    *("schedule.kind=python", "schedule.source=code/plateau_schedule.py:OnPlateau"),
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
            ["train", "lab", *_ANY_TASK, *_OWN, "steps=1", "out=new"],
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
    lab = [*_ANY_TASK, *_LAB_TASK]
    return ["train", "lab", *lab, "steps=1", "out=new", *kind, *texts]


def _keys(kind: list[str]) -> list[str]:
    """Every key there is under those overrides, groups and what is in them."""
    from sodfast.config import load_config
    from sodfast.study.definition import flatten

    values = load_config("lab", kind).model_dump()
    return sorted({*values, *flatten(values)})


# What is no file: texts of the command line.
TEXTS = {"overrides": random_overrides, "values": random_values}


def build_world(world: Path, say: Callable[[str], object] = print) -> None:
    """Real files of every kind. Raises `RuntimeError` where a command fails."""

    def command(*arguments: str) -> None:
        ended = forked.run(list(arguments), world, cpu_seconds=120)
        if ended.code:
            raise RuntimeError(f"{arguments}: {ended.code}\n{ended.out}\n{ended.err}")

    (world / "outside").mkdir(parents=True)
    (world / "outside" / "canary.txt").write_text("nobody may write this\n")
    say("building real files")
    command("train", "lab", *TINY_LAB, "steps=1", "out=lab-run")
    command("export", "lab-run", "model")
    forked.load(world / "model")
    _build_runs(world, command)
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


def _build_runs(world: Path, command: Callable[..., None]) -> None:
    (world / "code").mkdir()
    for name in ("arithmetic_task.py", "plateau_schedule.py"):
        shutil.copyfile(EXAMPLES / name, world / "code" / name)
    of_all_steps = ["log.samples_every=1", f"model.path={world / 'model'}"]
    command("train", "lab", *TINY_LAB, *of_all_steps, "steps=3", "out=run", "checkpoint.best=true")
    probes = ["schedule.kind=evidence", "schedule.min_isolation=0", "schedule.probe_every=1"]
    for name, keys in {
        "evidence-run": [*_LAB_TASK, *probes, "schedule.probe_questions=2", "schedule.probes=2"],
        "own-run": _OWN,
        "lora-run": [*_LAB_TASK, "model.lora.rank=2", "schedule.kind=ema"],
    }.items():
        command("train", "lab", *_ANY_TASK, *of_all_steps, *keys, "steps=3", f"out={name}")
    shutil.copytree(world / "run", world / "reported")
    command("report", "reported")
    shutil.copytree(world / "run", world / "old-run")
    for file in (world / "old-run").glob("checkpoints/*/state.json"):
        state = json.loads(file.read_text())
        del state["files"], state["sha256"]  # as release 0.1.0 wrote it
        file.write_text(json.dumps(state))
    # What a fork leaves that was killed before it wrote config.yaml.
    shutil.copytree(world / "run", world / "begun")
    for name in ("config.yaml", "summary.json", "samples"):
        path = world / "begun" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (world / "begun" / ".forking").touch()


def _build_study(world: Path) -> None:
    from synthetic import write_study

    study = {
        "base": "lab",
        "overrides": {"steps": 4, "eval": {"every": 2}},
        "axes": {"schedule": [{"kind": "hard", "every": 2}, {"kind": "cgtr"}], "seed": [0, 1]},
    }
    write_study(world / "study", study)
    (world / "study" / "logs").mkdir(exist_ok=True)
    (world / "study" / ".lock").touch()
    for name in ("lock", "failed", "log"):
        (world / "study" / "logs" / f"hard-every2,seed0.{name}").write_text("1\n")
    joint = {"plain": {}, "long": {"eval.samples": 3, "rollout": {"temperature": 0.5}}}
    varied = {**study, "axes": {"seed": [0]}, "variants": joint}
    (world / "sweep.yaml").write_text(yaml.safe_dump(varied))
    (world / "study" / "base.yaml").write_text("base: lab\n")
    (world / "study" / "study.yaml").write_text(yaml.safe_dump({**study, "base": "base.yaml"}))
