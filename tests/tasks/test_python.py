"""A task of the user's own: a class or a function, its failures, and the proof that the lab's task
written by a user trains as the built-in one does."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from marks import slow

from sodfast.commands import build_trainer
from sodfast.config import ArithmeticConfig, load_config
from sodfast.errors import RunFailed, UsageError
from sodfast.run.console import Reporter
from sodfast.run.directory import stored_config
from sodfast.tasks import Task, build_task
from sodfast.tasks.arithmetic import ArithmeticTask
from sodfast.tasks.base import Grade, grade
from sodfast.trainer import Trainer

EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic_task.py"
CLASS = r"""
import json, re
from sodfast.tasks import Question

class Arithmetic:
    def __init__(self, folder):
        for name in ("train", "test"):
            rows = [json.loads(line) for line in open(f"{folder}/{name}.jsonl")]
            setattr(self, name, [Question(row["prompt"], row["answer"]) for row in rows])

    def extract(self, response):
        match = re.search(r"=([0-9]+)\Z", response)
        return match and (match[1].lstrip("0") or "0")

    def score(self, question, response):
        return float(self.extract(response) == question.answer)
"""
FUNCTION = r"""
import re

def reward(prompts, completions, answer):
    found = [re.search(r"=([0-9]+)\Z", text) for text in completions]
    return [float(bool(m) and (m[1].lstrip("0") or "0") == a) for m, a in zip(found, answer)]
"""


@pytest.fixture(autouse=True)
def _imports_are_undone() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("own"):
            del sys.modules[name]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A folder with the rows of the tiny run's task."""
    task = ArithmeticTask(ArithmeticConfig(train=48, test=8))
    for name, questions in (("train", task.train), ("test", task.test)):
        lines = [json.dumps({"prompt": q.prompt, "answer": q.answer, "n": 1}) for q in questions]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def overrides(rows: Path, text: str, *more: str) -> list[str]:
    """`task.*` of a task whose source has this text."""
    (rows / "own.py").write_text(text)
    if "class " in text:
        name = text.split("class ")[1].split(":")[0].split("(")[0]
        keys = [f"task.source={rows / 'own.py'}:{name}"]
    else:
        keys = [f"task.{name}={rows / name}.jsonl" for name in ("train", "test")]
        keys.append(f"task.source={rows / 'own.py'}:reward")
    return ["task.name=python", *keys, *more]


def own(rows: Path, text: str, *more: str) -> Task:
    return build_task(load_config("lab", overrides(rows, text, *more)).task)


def refusal(rows: Path, text: str, *more: str) -> str:
    with pytest.raises(UsageError) as error:
        own(rows, text, *more)
    assert "\n" not in str(error.value)
    return str(error.value)


def failure(task: Task, *responses: str) -> str:
    with pytest.raises(RunFailed) as error:
        grade(task, task.train[: len(responses)], responses)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- functions


def test_a_function_gets_a_batch_and_its_columns(rows: Path) -> None:
    text = """
def reward(prompts, completions, **columns):
    assert sorted(columns) == ["answer", "n"]
    return [(i, f"{p} {c} {a}") for i, (p, c, a) in
            enumerate(zip(prompts, completions, columns["answer"]))]
"""
    task = own(rows, text)
    first, second = task.train[:2]
    assert grade(task, [first, second], ["x", "y"]) == [
        Grade(0.0, f"{first.prompt} x {first.answer}"),
        Grade(1.0, f"{second.prompt} y {second.answer}"),
    ]
    assert (task.score(second, "x"), task.extract) == (0.0, None)
    assert task.feedback(first, "x") == f"{first.prompt} x {first.answer}"


def test_chat_messages_arrive_as_in_trl(rows: Path) -> None:
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 1 more?"},
    ]
    (rows / "train.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
    text = """
def reward(prompts, completions):
    return [(float(len(prompts[0])), repr((prompts, completions)))]
"""
    task = own(rows, text)
    (question,) = task.train
    assert (question.prompt, question.system) == ("And 1 more?", "Be brief.")
    assert list(question.history) == prompt[1:3]
    assert task.feedback(question, "3") == repr(
        ([prompt], [[{"role": "assistant", "content": "3"}]])
    )


def test_columns_that_rows_lack(rows: Path) -> None:
    message = refusal(rows, "def reward(prompts, completions, solution): ...")
    assert message.startswith(f"{rows / 'train.jsonl'}, line 1: no column 'solution', which reward")
    assert "task.columns.solution" in message
    message = refusal(rows, FUNCTION, "task.columns.answer=solution")
    assert "no column 'solution' (there are prompt, answer, n)" in message
    task = own(
        rows,
        "def reward(prompts, completions, total=(0,), **rest): return total",
    )
    assert task.score(task.train[0], "x") == 0.0
    task = own(
        rows,
        "def reward(prompts, completions, solution): return [float(solution[0])]",
        "task.columns.solution=answer",
    )
    assert task.score(task.train[0], "x") == float(task.train[0].columns["solution"])


@pytest.mark.parametrize("name", ["prompts", "completions"])
def test_a_column_with_the_name_of_an_argument_is_refused(rows: Path, name: str) -> None:
    (rows / "test.jsonl").write_text(json.dumps({"prompt": "1+1=", name: "x"}) + "\n")
    text = "def reward(prompts, completions, **columns): return [len(columns) / 2]"
    message = refusal(rows, text)
    assert message.startswith(f"{rows / 'test.jsonl'}, line 1: a column {name!r}, which reward is")
    own(rows, text.replace(", **columns", ", n=None").replace("columns", "prompts"))
    (rows / "train.jsonl").write_text(json.dumps({"prompt": "2+1=", name: "x"}) + "\n")
    task = own(rows, text, f"task.columns.own_{name}={name}")
    assert task.score(task.train[0], "x") == 0.5


def test_what_is_no_reward_function(rows: Path) -> None:
    assert "must take (prompts, completions, **columns)" in refusal(rows, "def reward(x): ...")
    assert "is neither class nor function" in refusal(rows, "reward = 3")
    assert "task.options is for classes" in refusal(rows, FUNCTION, "task.options.x=1")
    assert "has no 'reward'" in refusal(rows, "def other(): ...")
    (rows / "own.py").write_text(FUNCTION)
    config = load_config("lab", ["task.name=python", f"task.source={rows / 'own.py'}:reward"])
    with pytest.raises(UsageError, match=r"task\.train: name the file"):
        build_task(config.task)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "own.py:2, reward: 1 rewards for 2 completions"),
        ("return [1.0, 2.0, 3.0]", "own.py:2, reward: 3 rewards for 2 completions"),
        ("return [1.0, float('nan')]", "must be a finite number, not 'nan' (row 'line 2')"),
        ("return [float('inf'), 1]", "must be a finite number, not 'inf' (row 'line 1')"),
        ("return [10**400, 1]", "must be a finite number, not '1000000"),
        ("return ['right', 1]", "must be a finite number, not 'right' (row 'line 1')"),
        ("return [None, 1]", "must be a finite number, not 'None' (row 'line 1')"),
        ("return [(1, 2), 1]", "feedback must be text or None, not '2' (row 'line 1')"),
        ("return None", "own.py:2, reward: must return a list, not 'None'"),
        ("return 1.0", "own.py:2, reward: must return a list, not '1.0'"),
        ("return [1 / (c != 'bad') for c in completions]", "division by zero (row 'line 2')"),
        ("raise SystemExit", "own.py:3: SystemExit"),
    ],
)  # fmt: skip
def test_a_function_that_fails_is_named_by_file_line_and_row(
    rows: Path, body: str, message: str
) -> None:
    task = own(rows, f"\ndef reward(prompts, completions):\n    {body}\n")
    assert message in failure(task, "good", "bad")


def test_a_result_that_cannot_be_used_is_placed_once(rows: Path) -> None:
    text = (
        "import math\n\ndef reward(prompts, completions):\n    return [math.nan] * len(prompts)\n"
    )
    said = "a reward must be a finite number, not 'nan' (row 'line 1')"
    task = own(rows, text)
    for answers in (["x"], ["x", "y"]):
        assert failure(task, *answers) == f"{rows / 'own.py'}:3, reward: {said}"
    text = CLASS.replace("return float(", "return str(")
    task = own(rows, text, f"task.options.folder={rows}")
    line = text.splitlines().index("    def score(self, question, response):") + 1
    assert failure(task, "x") == (
        f"{rows / 'own.py'}:{line}, Arithmetic: a reward must be a finite number, not 'False' "
        "(row 'train 0')"
    )
    task = own(rows, "from functools import partial\nreward = partial(lambda **columns: [])")
    assert failure(task, "x") == (
        f"{rows / 'own.py'}, reward: 0 rewards for 1 completions (row 'line 1')"
    )


def test_numbers_of_numpy_and_truth_values_are_rewards(rows: Path) -> None:
    text = """
import numpy as np

def reward(prompts, completions):
    return np.array([0.5, 1], dtype=np.float32) if len(prompts) == 2 else [True]
"""
    task = own(rows, text)
    assert [given.reward for given in grade(task, task.train[:2], ["x", "y"])] == [0.5, 1.0]
    assert task.score(task.train[0], "x") == 1.0


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import re; re.match('(a+)+$', 'a' * 40 + 'b')",  # lets no other thread run
    ],
)
def test_a_call_that_hangs_is_ended(rows: Path, body: str) -> None:
    text = f"\ndef reward(prompts, completions):\n    {body}\n"
    task = own(rows, text, "task.timeout=0.2")
    start = time.monotonic()
    assert failure(task, "x", "y") == (
        f"{rows / 'own.py'}:3: took longer than task.timeout=0.2 seconds"
    )
    assert time.monotonic() - start < 5


# ---------------------------------------------------------------- classes


def test_a_class_is_built_from_its_options(rows: Path) -> None:
    task = own(rows, CLASS, f"task.options.folder={rows}")
    built_in = ArithmeticTask(ArithmeticConfig(train=48, test=8))
    assert [q.prompt for q in task.train] == [q.prompt for q in built_in.train]
    assert [q.id for q in task.test] == [f"test {i}" for i in range(8)]
    question = task.train[0]
    for text in ("1", f"={question.answer}", "=0"):
        (given,) = grade(task, [question], [text])
        expected = grade(built_in, [built_in.train[0]], [text])[0]
        assert given == replace(expected, feedback=None)  # the class says nothing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class T:\n    def __init__(self, x): ...", "TypeError"),
        ("class T:\n    def __init__(self):\n        open('/nowhere')", "own.py:3: FileNotFound"),
        ("class T: ...", "AttributeError"),
        ("class T:\n    train = test = []", "has no method score"),
        ("class T:\n    train = test = []\n    def score(self, q, r): ...", "holds no questions"),
        (
            "class T:\n    train = test = ['1']\n    def score(self, q, r): ...",
            "must be a Question",
        ),
    ],
)
def test_a_class_that_cannot_be_built(rows: Path, text: str, message: str) -> None:
    assert message in refusal(rows, text)


@pytest.mark.parametrize(("id", "said"), [("'a\\ud800'", "is no Unicode"), ("7", "must be text")])
def test_an_id_that_no_file_can_hold_is_refused(rows: Path, id: str, said: str) -> None:
    text = CLASS.replace('row["answer"])', f'row["answer"], id={id})')
    message = refusal(rows, text, f"task.options.folder={rows}")
    assert "task.source: train[0]" in message and said in message and message.isprintable()


def test_a_class_that_fails(rows: Path) -> None:
    for name, body in (("score", "1 / 0"), ("feedback", "[]"), ("extract", "3")):
        text = CLASS.replace(f"def {name}(", "def unused(")
        text += f"\n    def {name}(self, *arguments):\n        return {body}\n"
        message = failure(own(rows, text, f"task.options.folder={rows}"), "x")
        assert {"score": "ZeroDivisionError", "feedback": "must be text or None, not '[]'"}.get(
            name, "extract must be text or None, not '3'"
        ) in message
        assert "row 'train 0'" in message or name == "extract"
    assert "brings its own questions" in refusal(rows, CLASS, f"task.train={rows}/train.jsonl")


# ---------------------------------------------------------------- runs


def trainer(tiny_run: list[str], out: Path, *keys: str) -> Trainer:
    if (out / "config.yaml").exists():
        return build_trainer(stored_config(out, list(keys)), out, Reporter())
    shared = [text for text in tiny_run if not text.startswith("task.")]
    return build_trainer(load_config("lab", [*shared, f"out={out}", *keys]), None, Reporter())


def run(trainer: Trainer) -> None:
    try:
        trainer.train()
    finally:
        trainer.run.close()


@pytest.mark.slow
def test_arithmetic_written_by_a_user_is_the_built_in_run_bit_for_bit(
    tiny_run: list[str], train: Callable[..., Any], read_run: Any, rows: Path
) -> None:
    """And resumes exactly, and refuses to after an edit."""
    built_in = train(rows / "built-in")
    options = [f"task.options.{key}={value}" for key, value in (("train", 48), ("test", 8))]
    keys = ["task.name=python", f"task.source={EXAMPLE}:Arithmetic", *options]
    run(trainer(tiny_run, rows / "class", *keys))
    assert read_run(rows / "class") == built_in

    keys = overrides(rows, FUNCTION)
    run(trainer(tiny_run, rows / "function", *keys, "steps=3"))
    run(trainer(tiny_run, rows / "function", "steps=6"))
    found = read_run(rows / "function")
    for line, other in zip(found.lines, built_in.lines, strict=True):
        assert line == {key: v for key, v in other.items() if not key.startswith("eval/maj")}
    assert not any(key.startswith("eval/maj") for line in found.lines for key in line)
    assert found.events == built_in.events

    for name in ("own.py", "train.jsonl", "test.jsonl"):
        before = (rows / name).read_text()
        (rows / name).write_text(before + "\n")
        with pytest.raises(UsageError, match=rf"{name} is not as it was when the run began"):
            trainer(tiny_run, rows / "function", "steps=7")
        (rows / name).write_text(before)
    trainer(tiny_run, rows / "function", "steps=7").run.close()


def test_a_reward_that_fails_saves_the_last_step(tiny_run: list[str], rows: Path) -> None:
    count = "    if len(prompts) == 16: calls.append(1 / (3 - len(calls)))\n    found"
    keys = overrides(rows, "calls = []\n" + FUNCTION.replace("    found", count))
    built = trainer(tiny_run, rows / "run", *keys, "checkpoint.every=5")
    with pytest.raises(RunFailed, match=r"step \d: .*own\.py:\d+: ZeroDivisionError"):
        run(built)
    assert (rows / "run" / "checkpoints" / f"step-{built.step}").is_dir() and built.step > 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('x')", "own.py:6: KeyError: 'x' (row "),
        *slow(
            ("return [1.0]", "own.py:3, reward: 1 rewards for 16 completions"),
            (
                "return [float('nan')] * 16",
                "must be a finite number, not 'nan' (row ",
            ),
            ("return ['good'] * 16", "must be a finite number, not 'good' (row "),
            ("while True: pass", "own.py:6: took longer than task.timeout=0.5 seconds"),
        ),
    ],
)
def test_a_command_whose_reward_fails_says_so_in_one_line_and_saves_the_last_step(
    tiny_run: list[str], rows: Path, cli: Any, body: str, message: str
) -> None:
    """From step 3 on: exit code 1, and the last finished step is saved though none was due."""
    text = f"""
calls = []
def reward(prompts, completions, answer):
    calls.append(1)
    if len(calls) >= 3:
        {body}
    return [float(a in text) for text, a in zip(completions, answer)]
"""
    shared = [key for key in tiny_run if not key.startswith(("task.", "checkpoint.", "eval.every"))]
    keys = ["eval.every=0", "checkpoint.every=99", "task.timeout=0.5", f"out={rows / 'run'}"]
    failed = cli("train", *shared, *overrides(rows, text), *keys)
    line = failed.err.splitlines()[-1]
    assert failed.code == 1 and line.startswith("sodfast: step 3: ") and message in line
    assert failed.err.count("sodfast: ") == 1 and "Traceback" not in failed.err
    assert sorted(file.name for file in (rows / "run" / "checkpoints").iterdir())[-1] == "step-2"
    assert json.loads((rows / "run" / "summary.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["task.source={}/none.py:reward"], "task.source: there is no file"),
        (["task.source=no_such_package.own:reward"], "task.source: "),
        (["task.source={}/own.py:rewards"], "has no 'rewards'"),
        (["task.train={}/none.jsonl"], "none.jsonl"),
        (["task.columns.answer=solution"], "task.columns.answer"),
        (["model.chat_template_kwargs.think=true"], "model.chat_template_kwargs: "),
    ],
)
def test_a_command_that_cannot_use_the_task_writes_nothing(
    tiny_run: list[str], rows: Path, cli: Any, keys: list[str], message: str
) -> None:
    shared = [key for key in tiny_run if not key.startswith("task.")]
    keys = [f"out={rows / 'run'}", *(key.format(rows) for key in keys)]
    refused = cli("train", *shared, *overrides(rows, FUNCTION), *keys)
    assert refused.code == 2 and message in refused.err
    assert refused.err.startswith("sodfast: ") and refused.err.count("\n") == 1
    assert not (rows / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("evaluated", "call"), [(4, 6), (6, 9)])
def test_a_step_whose_evaluation_fails_is_kept_and_evaluated_by_a_resume(
    tiny_run: list[str], read_run: Any, rows: Path, evaluated: int, call: int
) -> None:
    """The evaluation of step 4, or the closing one of step 6: afterwards the run is as if nothing
    had happened, answers and checkpoints included."""
    switch = rows / "broken"
    text = (
        FUNCTION
        + f"""
sound, calls = reward, []
def reward(prompts, completions, answer):
    import os
    calls.append(1)
    if os.path.exists({str(switch)!r}) and len(calls) == {call}:
        raise OSError("no answer")
    return sound(prompts, completions, answer)
"""
    )
    keys = [*overrides(rows, text), "checkpoint.every=99", "log.samples_every=null"]
    run(trainer(tiny_run, rows / "whole", *keys))
    switch.touch()
    with pytest.raises(RunFailed, match=rf"^step {evaluated}: .*OSError: no answer"):
        run(trainer(tiny_run, rows / "run", *keys))
    line = json.loads((rows / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == evaluated and not any(key.startswith("eval/") for key in line)
    checkpoints = {file.name for file in (rows / "run" / "checkpoints").iterdir()}
    assert f"step-{evaluated}" in checkpoints
    summary = json.loads((rows / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("failed", evaluated)

    switch.unlink()
    for _ in range(2):  # the second finds nothing to do
        run(trainer(tiny_run, rows / "run"))
        assert read_run(rows / "run") == read_run(rows / "whole")
        found, expected = (
            {file.name: file.read_bytes() for file in (rows / name / "samples").iterdir()}
            for name in ("run", "whole")
        )
        assert found == expected


def test_rewards_on_another_scale_need_their_thresholds(tiny_run: list[str], rows: Path) -> None:
    switch = rows / "doubled"
    text = FUNCTION.replace("float(", f"(1 + os.path.exists({str(switch)!r})) * float(")
    text = f"import os\n{text}"
    keys = [k for k in tiny_run if not k.startswith("collapse.")]
    run(trainer(keys, rows / "resumed", *overrides(rows, text), "steps=1"))
    switch.touch()
    for name, task in (("run", overrides(rows, text)), ("resumed", ["steps=2"])):
        said = r"set collapse\.eval_floor and schedule\.reward_margin on"
        with pytest.raises(RunFailed, match=said):
            run(trainer(keys, rows / name, *task))
    scale = ["collapse.eval_floor=-0.5", "schedule.reward_margin=0.06"]
    run(trainer(keys, rows / "other", *overrides(rows, text), "steps=1", *scale))
    last = json.loads((rows / "other" / "metrics.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(last["eval/mean@2"]) and last["reward/mean"] > 0
