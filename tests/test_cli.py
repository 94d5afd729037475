"""The commands: what they print, what they refuse, and that a refusal leaves nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Command, Outcome
from marks import exhaustive, slow

from sodfast.config import load_config
from sodfast.errors import Interrupted
from sodfast.model.packing import own_attention
from sodfast.run.directory import ABOUT_EVALUATION, RunDirectory
from sodfast.trainer import Trainer


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder without a network."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(outcome: Outcome, *named: str) -> None:
    """One line on stderr, exit code 2."""
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("sodfast: ") and outcome.err.count("\n") == 1, outcome.err
    for text in named:
        assert text in outcome.err


# ---------------------------------------------------------------- help, --dry-run


@pytest.mark.parametrize(
    "command", ["train", "eval", "export", "sweep", "report", "replay", "show"]
)
def test_every_command_has_help(cli: Command, command: str) -> None:
    assert command in cli("--help").out
    outcome = cli(command, "--help")
    assert outcome.code == 0 and "Usage" in outcome.out and outcome.err == ""


def test_the_versions_of_both_distributions(cli: Command) -> None:
    version = (Path(__file__).parents[1] / "kernels" / "VERSION").read_text()
    outcome = cli("--version")
    assert outcome == Outcome(0, f"sodfast {version}sodfast-kernels {version}", "")


def test_dry_run_prints_a_configuration_that_loads(cli: Command, here: Path) -> None:
    arguments = ["steps=7", "schedule.kind=hard", "schedule.every=3"]
    outcome = cli("train", *arguments, "--dry-run")
    assert outcome.code == 0
    assert tree(here) == {}
    (here / "config.yaml").write_text(outcome.out)
    assert load_config("config.yaml", []) == load_config("lab", arguments)
    assert yaml.safe_load(outcome.out)["schedule"] == {"kind": "hard", "every": 3}


# ---------------------------------------------------------------- refusals


MISTAKES = {
    "unknown key": (["stepz=3"], ["stepz", "steps"]),
    "unknown key of a group": (["schedule.evry=3", "schedule.kind=hard"], ["evry", "every"]),
    "key of another kind": (["schedule.kind=ema", "schedule.every=3"], ["schedule.every"]),
    "unknown kind": (["schedule.kind=magic"], ["schedule"]),
    "a word for a number": (["steps=abc"], ["steps"]),
    "a fraction for a count": (["steps=1.5"], ["steps"]),
    "no steps": (["steps=0"], ["steps"]),
    "a negative seed": (["seed=-1"], ["seed"]),
    "not a number": (["optimizer.lr=.nan"], ["optimizer.lr"]),
    "no siblings": (["rollout.samples_per_prompt=1"], ["samples_per_prompt", "teacher.context"]),
    "an uneven cut": (["optimizer.updates_per_step=3"], ["updates_per_step", "divide"]),
    "no room for an answer": (["rollout.max_new_tokens=0"], ["rollout.max_new_tokens"]),
    "unknown engine": (["rollout.engine=fast"], ["rollout.engine", "native"]),
    "an empty stop string": (["task.stop=['']"], ["task.stop"]),
    "no equals sign": (["steps=3", "oops"], ["oops", "key=value"]),
    "missing configuration": (["nowhere.yaml"], ["nowhere.yaml"]),
    "empty configuration": (["empty.yaml"], ["empty.yaml"]),
    "a list as configuration": (["list.yaml"], ["list.yaml"]),
    "broken YAML": (["broken.yaml"], ["broken.yaml"]),
    "a folder as configuration": (["folder"], ["folder"]),
    "no such GPU": (["device=cuda:63"], ["cuda:63"]),
    "unknown device": (["device=tpu"], ["device"]),
    "missing sink": (["log.sinks=[trackio]"], ["trackio", "pip install"]),
    "too many questions": (["task.train=99999"], ["task.train"]),
    "task without a model": (
        ["task.name=tool_use", "task.train=a.jsonl", "task.test=b.jsonl"],
        ["model.path"],
    ),
    "missing model": (["model.path=./nowhere"], ["model.path"]),
    "unknown shape": (["model.random=Qwen/Qwen9"], ["model.random", "Qwen/Qwen3-8B"]),
    "a shape beside a model": (["model.random=x", "model.path=y"], ["model.random", "model.path"]),
    "no FlashAttention": (
        ["model.random=sodfast/tiny", "model.attention=flash", "device=cpu"],
        ["model.attention=flash", "device=cuda"],
    ),
    "empty model folder": (["model.path=folder"], ["config.json"]),
    "out is a file": (["out=list.yaml"], ["out=list.yaml"]),
    "out is in use": (["out=used"], ["out=used", "--resume"]),
    "out below a file": (["out=list.yaml/run"], ["out=list.yaml/run"]),
    "out too long": (["out=" + "x" * 300], ["out="]),
    "resume of nothing": (["--resume", "folder"], ["config.yaml"]),
    "resume of a missing folder": (["--resume", "nowhere"], ["config.yaml"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    cli: Command, here: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("sodfast.run.loggers.find_spec", lambda name: None)
    monkeypatch.setattr("sodfast.lab.warm_start.build", None)  # found before any work
    (here / "empty.yaml").touch()
    (here / "list.yaml").write_text("- steps\n")
    (here / "broken.yaml").write_text("steps: [1\nseed: }")
    (here / "folder").mkdir()
    (here / "used").mkdir()
    (here / "used" / "notes.txt").write_text("mine")
    before = tree(here)
    arguments, named = MISTAKES[name]
    refused(cli("train", *arguments), *named)
    assert tree(here) == before


ROLLOUTS = {
    "rollout.max_new_tokens=40000": ["rollout.max_new_tokens=40000", "32768 positions"],
    "rollout.cache_gib=1e-6": ["rollout.max_new_tokens", "rollout.cache_gib"],
    "rollout.engine=vllm": ["pip install 'sodfast[vllm]'"],
}


@pytest.mark.parametrize("override", ROLLOUTS)
def test_rollouts_that_cannot_run_are_refused_before_work(
    cli: Command,
    here: Path,
    tiny_run: list[str],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    override: str,
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    refused(cli("train", *tiny_run, "out=run", override), *ROLLOUTS[override])
    refused(cli("eval", str(tiny_model), override), *ROLLOUTS[override])
    assert tree(here) == {}


def test_an_out_that_cannot_be_written(cli: Command, tiny_run: list[str]) -> None:
    refused(cli("train", *tiny_run, "out=/proc/sodfast-run"), "/proc/sodfast-run")


ROWS = {
    "malformed": ('{"prompt": "A: 1\\nB: 2", "answer": "A"}\n{"prompt": ', "line 2"),
    "not an object": ("[1]\n", "line 1"),
    "no prompt": ('{"answer": "A"}\n', "prompt"),
    "no answer": ('{"prompt": "A: 1\\nB: 2"}\n', "answer"),
    "outside the options": ('{"prompt": "A: 1\\nB: 2", "answer": "C"}\n', "A, B"),
    "empty": ("", "no rows"),
}


@pytest.mark.parametrize("name", ROWS)
def test_bad_rows_are_placed(cli: Command, here: Path, tiny_model: Path, name: str) -> None:
    text, named = ROWS[name]
    (here / "bad.jsonl").write_text(text)
    (here / "good.jsonl").write_text('{"prompt": "A: 1\\nB: 2", "answer": "A"}\n')
    before = tree(here)
    task = ["task.name=multiple_choice", f"model.path={tiny_model}"]
    for train, test in (("bad", "good"), ("good", "bad"), ("missing", "good")):
        outcome = cli("train", *task, f"task.train={train}.jsonl", f"task.test={test}.jsonl")
        refused(outcome, *(["missing.jsonl"] if train == "missing" else ["bad.jsonl", named]))
    assert tree(here) == before


def test_a_model_without_a_tokenizer(cli: Command, here: Path, tiny_model: Path) -> None:
    model = here / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_bytes((tiny_model / name).read_bytes())
    before = tree(here)
    refused(cli("train", "model.path=model", "out=run"), "tokenizer")
    refused(cli("eval", "model"), "tokenizer")
    assert tree(here) == before


def test_an_existing_run_is_not_overwritten(
    cli: Command, tiny_run: list[str], finished: Path
) -> None:
    before = tree(finished)
    refused(cli("train", *tiny_run, f"out={finished}"), "--resume")
    assert tree(finished) == before


def test_a_resume_changes_nothing_but_the_steps(cli: Command, finished: Path) -> None:
    before = tree(finished)
    resume = ["train", "--resume", str(finished)]
    refused(cli(*resume, "seed=1"), "seed=1", "steps=N")
    refused(cli(*resume, "lab"), "steps=N")
    refused(cli(*resume, "steps=1"), "steps=1", "2")
    refused(cli(*resume, "steps=0"), "steps")
    assert tree(finished) == before


def test_a_run_of_another_configuration_is_not_resumed(
    cli: Command, train: Callable[..., Any], here: Path
) -> None:
    train(here / "run", "steps=1")
    config = here / "run" / "config.yaml"
    config.write_text(config.read_text().replace("\nseed: 0\n", "\nseed: 1\n", 1))
    config.write_text("seed: 1\n" + config.read_text().replace("seed: 0\n", "", 1))
    before = tree(here)
    refused(cli("train", "--resume", "run", "steps=2"), "config.yaml")
    assert tree(here) == before


def test_a_locked_run_is_left_alone(cli: Command, train: Callable[..., Any], here: Path) -> None:
    train(here / "run", "steps=1")
    before = tree(here)
    writer = RunDirectory.open(here / "run")
    refused(cli("train", "--resume", "run", "steps=2"), "another process")
    assert tree(here) == before
    writer.close()
    assert cli("train", "--resume", "run", "steps=2").code == 0


def test_eval_and_export_refuse_too(cli: Command, here: Path, finished: Path) -> None:
    (here / "folder").mkdir()
    before = tree(here)
    refused(cli("eval", "folder"), "config.json")
    refused(cli("eval", "./nowhere"), "nowhere")
    refused(cli("eval", str(finished), "eval.smples=3"), "eval.smples", "samples")
    refused(cli("export", "folder", "out"), "no checkpoint")
    refused(cli("export", "nowhere", "out"), "no checkpoint")
    refused(cli("export", str(finished), "folder"), "exists")
    assert tree(here) == before


def test_wrong_options_are_refused(cli: Command) -> None:
    for arguments in (["train", "--resum", "x"], ["export", "one"], ["fly"], ["eval"]):
        outcome = cli(*arguments)
        assert outcome.code == 2 and outcome.err and "Traceback" not in outcome.err
        refused(outcome, "see sodfast --help")


def test_without_a_command_there_is_help(cli: Command) -> None:
    outcome = cli()
    assert outcome.code == 2 and "Usage" in outcome.out and outcome.err == ""


def test_an_error_is_printed_by_rank_0_and_where_no_rank_is_named(
    cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")  # of something else than torchrun
    refused(cli("train", "stepz=3"), "stepz")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert cli("train", "stepz=3") == Outcome(2, "", "")
    monkeypatch.delenv("RANK")
    refused(cli("train", "stepz=3"), "stepz")


def test_a_line_about_a_long_name_says_its_beginning_and_what_is_wrong(cli: Command) -> None:
    outcome = cli("train", "x" * 100_000, "--dry-run")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and len(outcome.err) < 3000
    assert "no configuration file 'xxx" in outcome.err and "presets: base" in outcome.err


def test_paths_longer_than_any_are_refused(cli: Command, here: Path, finished: Path) -> None:
    for path in ("x" * 5000, "x/" * 2400, "x/" * 1500):
        for arguments in (["--resume", path], [path], [f"out={path}"], [f"model.path={path}"]):
            refused(cli("train", *arguments))
        refused(cli("eval", path))
        refused(cli("export", path, "out"))
        refused(cli("export", str(finished), path))
        refused(cli("sweep", "schedules_lab", f"out={path}"))
        refused(cli("report", str(finished), "--out", path))
        for command in ("sweep", "report", "calibrate", "show", "replay"):
            refused(cli(command, path))
    (here / "study.yaml").write_text(f"base: {'x' * 5000}\naxes: {{seed: [0]}}\n")
    refused(cli("sweep", "study.yaml", "out=new"))
    assert list(tree(here)) == ["study.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "name"),
    [("LC_ALL=C", "rün"), *exhaustive(("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0", "run"))],
)
def test_any_locale_will_do(finished: Path, here: Path, environment: str, name: str) -> None:
    """Nothing but what is drawn on the screen depends on it."""
    run = shutil.copytree(finished, here / name)
    command = f'env {environment} "$@"'
    arguments = [sys.executable, "-m", "sodfast", "train", "--resume", str(run)]
    done = subprocess.run(["bash", "-c", command, "bash", *arguments], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert tree(run)["metrics.jsonl"] == tree(finished)["metrics.jsonl"]


@pytest.mark.parametrize("option", ["--dry-run", *slow("--help")])
@pytest.mark.parametrize("output", ["> /dev/full", *slow("| (exec <&-)")])
def test_a_result_that_nobody_can_read_is_a_failure_in_one_line(
    here: Path, output: str, option: str
) -> None:
    command = [sys.executable, "-m", "sodfast", "train", option]
    run = f'set -o pipefail; exec 3>err; "$@" 2>&3 {output}'
    done = subprocess.run(["bash", "-c", run, "bash", *command], timeout=300)
    said = (here / "err").read_text()
    assert said.startswith("sodfast: standard output") and said.count("\n") == 1, said
    assert done.returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("output", ["> /dev/full", *exhaustive(">&-", "| true")])
def test_an_evaluation_that_nobody_can_read_fails_in_one_line(
    finished: Path, here: Path, output: str
) -> None:
    command = [sys.executable, "-m", "sodfast", "eval", str(finished)]
    evaluate = f'set -o pipefail; exec 3>err; "$@" 2>&3 {output}'
    done = subprocess.run(["bash", "-c", evaluate, "bash", *command], timeout=300)
    said = (here / "err").read_text()
    assert said.startswith("sodfast: standard output") and said.count("\n") == 1, said
    assert done.returncode == (0 if output == ">&-" else 1)


@pytest.mark.parametrize("level", ["2", *slow("1")])
def test_python_without_docstrings_is_refused_and_without_assertions_is_not(
    level: str, here: Path
) -> None:
    command = [sys.executable, "-m", "sodfast", "train", "--dry-run"]
    environment = {**os.environ, "PYTHONOPTIMIZE": level}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if level == "1":
        assert done.returncode == 0 and done.stdout.startswith("seed: 0\n"), done.stderr
    else:
        refused(Outcome(done.returncode, done.stdout, done.stderr), "PYTHONOPTIMIZE")


# ---------------------------------------------------------------- the commands' work


def test_a_run_without_a_learning_signal_says_so_once(
    cli: Command, tiny_run: list[str], here: Path
) -> None:
    outcome = cli(
        "train", *tiny_run, "steps=2", "objective.distill_coef=0", "objective.policy_coef=0"
    )
    assert outcome.code == 0
    (said,) = [line for line in outcome.out.splitlines() if "no learning signal" in line]
    assert "objective.distill_coef" in said


def test_train_prints_plain_lines_and_a_table(
    cli: Command, tiny_run: list[str], here: Path
) -> None:
    outcome = cli("train", *tiny_run, "steps=2", "out=run")
    assert outcome.code == 0 and outcome.err == ""
    lines = outcome.out.splitlines()
    assert any(line.startswith("step 2/2  reward ") and "tok/s" in line for line in lines)
    assert lines[-1] == "metrics: run/metrics.jsonl"
    assert {path.name for path in (here / "run").iterdir()} >= {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "events.jsonl",
        "summary.json",
        "checkpoints",
    }
    assert load_config("run/config.yaml", []).steps == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "output", ["| head -1", *exhaustive("2>&1 | head -1", "> /dev/full", ">&-", ">&- 2>&-")]
)
def test_training_goes_on_without_its_output(
    tiny_run: list[str], train: Callable[..., Any], here: Path, output: str
) -> None:
    train_it = f'set -o pipefail; exec 3>err; "$@" 2>&3 {output}'
    command = [sys.executable, "-m", "sodfast", "train", *tiny_run, "steps=2", "out=run"]
    process = subprocess.run(["bash", "-c", train_it, "bash", *command], timeout=300)
    said = (here / "err").read_text()
    assert process.returncode == 0, said
    if "2>" in output:
        assert said == ""
    else:
        assert said.startswith("sodfast: standard output") and said.count("\n") == 1, said
    expected = train(here / "expected", "steps=2")
    assert train(here / "run") == expected  # finished: nothing is left to do


def test_out_defaults_to_a_new_folder_under_runs(
    cli: Command, tiny_run: list[str], here: Path
) -> None:
    assert cli("train", *tiny_run, "steps=1", "seed=5").code == 0
    (run,) = (here / "runs").iterdir()
    assert run.name.endswith("cgtr-seed5")


def test_eval_of_a_run_repeats_its_last_evaluation(cli: Command, finished: Path) -> None:
    before = tree(finished)
    outcome = cli("eval", str(finished))
    assert outcome.code == 0
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    expected = {k: v for k, v in last.items() if k == "step" or k.startswith("eval/")}
    assert json.loads(outcome.out.splitlines()[-1]) == expected
    assert json.loads(cli("eval", str(finished), "eval.samples=3").out.splitlines()[-1]).keys() == {
        "step",
        "eval/mean@3",
        "eval/best@1",
        "eval/best@2",
        "eval/maj@1",
        "eval/maj@2",
    }
    assert tree(finished) == before


def test_eval_of_a_model_is_a_runs_first_evaluation(
    cli: Command, tiny_run: list[str], tiny_model: Path, finished: Path
) -> None:
    settings = [text for text in tiny_run if text.startswith(("task.", "eval.", "rollout."))]
    outcome = cli("eval", str(tiny_model), *settings)
    first = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    scores = {key: value for key, value in first.items() if key not in ABOUT_EVALUATION}
    assert json.loads(outcome.out.splitlines()[-1]) == scores


def test_export_keeps_the_logits(cli: Command, build: Callable[..., Trainer], here: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = build(here / "run", "steps=1")
    trainer.train()
    trainer.run.close()
    assert cli("export", "run", "exported").code == 0
    others = {path.name for path in (here / "exported").iterdir() if path.suffix != ".json"}
    assert others == {"README.md", "model.safetensors"}
    assert "after step 1." in (here / "exported" / "README.md").read_text()
    network = AutoModelForCausalLM.from_pretrained("exported")
    tokenizer = AutoTokenizer.from_pretrained("exported")
    ids = tokenizer("17*8+6=", return_tensors="pt").input_ids
    assert ids[0].tolist() == trainer.model.encode("17*8+6=")
    with torch.no_grad(), own_attention(trainer.model.network):
        assert network(ids).logits.equal(trainer.model.network(ids).logits)


def test_exit_codes(cli: Command, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from sodfast import commands
    from sodfast.errors import RunFailed

    refused = PermissionError(13, "Permission denied", "run/samples")
    ends = {Interrupted(): 130, KeyboardInterrupt(): 130, RunFailed("step 3: a\nb"): 1, refused: 1}
    for end, code in ends.items():

        def stop(*arguments: Any, end: BaseException = end) -> None:
            raise end

        monkeypatch.setattr(commands, "train_run", stop)
        outcome = cli("train", *tiny_run)
        assert outcome.code == code
        wrong = "step 3: a b" if end is not refused else f"{refused}"
        assert outcome.err == (f"sodfast: {wrong}\n" if code == 1 else "")


def test_sigterm_before_the_training_is_an_interruption_too(
    cli: Command, tiny_run: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sodfast.commands.build_task", lambda config: signal.raise_signal(signal.SIGTERM)
    )
    assert cli("train", *tiny_run, "out=run").code == 130
    assert tree(here) == {}
