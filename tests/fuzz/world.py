"""A small world of real files of every kind, which the fuzz damages copies of."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import forked
import yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_LAB = [
    *("lab.hidden_size=16", "lab.layers=1", "lab.heads=2", "lab.intermediate_size=16"),
    *("lab.batches=2", "lab.rows=1", "lab.warmup_batches=1", "task.train=4", "task.test=2"),
    *("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_new_tokens=8"),
    *("eval.samples=2", "eval.every=1", "checkpoint.every=1", "checkpoint.keep=2"),
    *("schedule.min_isolation=1", "schedule.check_every=1", "schedule.window=1"),
]
ANY_TASK = [text for text in TINY_LAB if not text.startswith(("task.", "schedule."))]
LAB_TASK = ["task.train=4", "task.test=2"]
OWN = [  # the user's code
    *("task.name=python", "task.source=code/arithmetic_task.py:Arithmetic"),
    *("task.options={train: 4, test: 2}", "schedule.options.patience=1"),
    *("schedule.kind=python", "schedule.source=code/plateau_schedule.py:OnPlateau"),
]
ROWS = {
    "multiple_choice": {"prompt": "1+1?\nA: 2\nB: 3", "answer": "A"},
    "math": {"prompt": "1+1", "answer": "\\frac{4}{2}", "system": "3+4"},
    "tool_use": {"prompt": "1+1", "answer": [{"Action": "add", "Action_Input": {"a": 1}}]},
    "code": {"prompt": "1+1", "tests": [{"stdin": "1", "stdout": "1"}]},
}


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
    for name, row in ROWS.items():
        for half in ("train", "test"):
            lines = [{**row, "id": f"{half}-{n}"} for n in range(3)]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (world / "rows" / f"{name}-{half}.jsonl").write_text(text)
    _build_study(world)
    (world / "layers").mkdir()
    above = {"base": "below.yaml", "steps": 3, "schedule": {"min_isolation": 4}}
    above["eval"] = {"tasks": {"other": {"name": "arithmetic", "test": 3}}}
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
        "evidence-run": [*LAB_TASK, *probes, "schedule.probe_questions=2", "schedule.probes=2"],
        "own-run": OWN,
        "lora-run": [*LAB_TASK, "model.lora.rank=2", "schedule.kind=ema"],
    }.items():
        command("train", "lab", *ANY_TASK, *of_all_steps, *keys, "steps=3", f"out={name}")
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
    (world / "study" / "study.yaml").write_text(
        yaml.safe_dump({**study, "base": "base.yaml"}, sort_keys=False)
    )
