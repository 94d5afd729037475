"""The task `code`: golden answers with their feedback, rows that cannot be used, many at once."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from marks import slow

from sodfast.config import CodeConfig, SandboxConfig
from sodfast.errors import UsageError
from sodfast.tasks.base import Question, grade
from sodfast.tasks.code import CodeTask, find_program
from sodfast.tasks.sandbox_runner import descendants

ADD = [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "-1 1", "stdout": "0"}]
RIGHT = "print(sum(map(int, input().split())))"


def rows(folder: Path, *tests: Any, **fields: Any) -> dict[str, str]:
    files = {name: folder / f"{name}.jsonl" for name in ("train", "test")}
    for file in files.values():
        lines = [json.dumps({"prompt": "Add.", "tests": test, **fields}) for test in tests]
        file.write_text("\n".join(lines) + "\n")
    return {name: str(file) for name, file in files.items()}


@pytest.fixture(scope="module")
def task(namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> CodeTask:
    options = SandboxConfig(memory_mib=128, processes=6)
    keys: dict[str, Any] = {"options": options, "timeout": 3.0}
    return CodeTask(CodeConfig(**rows(tmp_path_factory.mktemp("rows"), ADD), **keys))


def question(tests: Any, **fields: Any) -> Question:
    return Question("Add.", columns={"prompt": "Add.", "tests": tests, **fields})


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("x = 1", "x = 1"),
        ("So:\n```python\nx = 1\n```\nThat is it.", "x = 1\n"),
        ("```\na\n```\nNo.\n```py\nb\n\nc\n```", "b\n\nc\n"),
        ("```python\nx = 1", "```python\nx = 1"),  # cut at the cap
        ("Use `x` here.\n```python\nprint('```')\n```", "print('```')\n"),
    ],
)
def test_a_program_is_the_last_block(response: str, program: str) -> None:
    assert find_program(response) == program


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (f"```python\n{RIGHT}\n```", None),
        ("print(3)", "Test 2 failed.\nInput:\n-1 1\nExpected:\n0\nGot:\n3"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("  \n", "The response holds no program."),
        *slow(
            (RIGHT, None),
            ("print(' 3 ')", "Test 1 failed.\nInput:\n1 2\nExpected:\n3\nGot:\n 3 "),
            ("print(3", "SyntaxError: '(' was never closed"),
            (f"{RIGHT}\nexit(2)", "Expected:\n3\nThe program ended with exit code 2."),
            ("import os\nos._exit(0)", "Test 1 failed.\nInput:\n1 2\nExpected:\n3\nGot:\n"),
            ("while True: pass", "Expected:\n3\nThe program took longer than 3 seconds."),
            ("x = bytearray(10**10)", "MemoryError"),
            ("while True: print('x' * 1000)", "The program wrote more than 64 KiB."),
            (
                "import os\nwhile True: os.fork()",
                "BlockingIOError: [Errno 11] Resource temporarily",
            ),
            ("open('/usr/lib/x', 'w')", "OSError: [Errno 30] Read-only file system: '/usr/lib/x'"),
            ("import os\nos.listdir('/home')", "FileNotFoundError: [Errno 2] No such file"),
            (
                "import socket\nsocket.create_connection(('1.1.1.1', 1), 1)",
                "Network is unreachable",
            ),
            (
                "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(99)\nos.wait()",
                "Expected:\n3\nThe program took longer than 3 seconds.",
            ),
        ),
    ],
)
def test_programs_with_input_and_output(task: CodeTask, program: str, words: str | None) -> None:
    (given,) = grade(task, [question(ADD)], [program])
    assert (given.reward, given.answer) == (float(words is None), None)
    assert given.feedback is None if words is None else words in str(given.feedback)
    assert "sandbox_runner" not in str(given.feedback)


def test_a_run_is_not_there_for_a_program(task: CodeTask, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("3")
    path = str(tmp_path / "config.yaml")
    feedback = str(task.feedback(question(ADD), f"print(open({path!r}).read())"))
    assert f"FileNotFoundError: [Errno 2] No such file or directory: {path!r}" in feedback


ONE = "assert add(1, 2) == 3"
HUMAN = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(0, 0) == 0\n"


@pytest.mark.parametrize(
    ("tests", "entry_point", "program", "words"),
    [
        (["x = 3", "assert add(1, 2) == x"], "add", "def add(a, b): return a + b", None),
        (HUMAN, "add", "def add(a, b): return 3", "assert candidate(0, 0) == 0"),
        ([ONE], None, "import os\nos._exit(0)", "ended before its tests"),
        *slow(
            ([ONE], None, "def add(a, b): return a + b", None),
            (HUMAN, "add", "def add(a, b): return a + b", None),
            (HUMAN, "add", "def sub(a, b): return 3", "NameError: name 'add' is not defined"),
            ([ONE], None, "def add(a, b): return 1", "assert add(1, 2) == 3"),
            ([ONE], None, "def add(a, b): return a.x", "AttributeError: 'int'"),
            ([ONE], None, "import sys\nsys.exit(0)", "ended before its tests"),
            ([ONE], None, "def add(a, b):\n  while 1: 1", "longer than 3 seconds"),
            (["assert x == 3"], None, "x = 3\nif __name__ == '__main__': input()", None),
        ),
    ],
)
def test_programs_with_asserts(
    task: CodeTask, tests: Any, entry_point: str | None, program: str, words: str | None
) -> None:
    (given,) = grade(task, [question(tests, entry_point=entry_point)], [program])
    assert given.reward == float(words is None)
    assert given.feedback is None if words is None else words in str(given.feedback)


def test_long_texts_are_cut_in_a_feedback(task: CodeTask) -> None:
    tests = [{"stdin": "1 " * 5000, "stdout": "2 " * 5000}]
    feedback = str(task.feedback(question(tests), "print('3 ' * 5000)"))
    assert len(feedback) < 1700 and feedback.count(" …") == 3


@pytest.mark.parametrize(
    "tests",
    [None, [], "", " ", 3, [3], [{"stdin": "1"}], [{"stdin": 1, "stdout": "2"}], [{}, "assert"]],
)
def test_tests_that_cannot_be_used(tmp_path: Path, tests: Any) -> None:
    with pytest.raises(UsageError, match=r"line 1: field 'tests' must be a list of objects"):
        CodeTask(CodeConfig(**rows(tmp_path, tests)))


def test_other_rows_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"field 'entry_point' must be the name"):
        CodeTask(CodeConfig(**rows(tmp_path, ["assert f()"], entry_point="f()")))
    with pytest.raises(UsageError, match=r"a 'stdout' exceeds 64 KiB"):
        CodeTask(CodeConfig(**rows(tmp_path, [{"stdin": "", "stdout": "x" * 70_000}])))
    with pytest.raises(UsageError, match=r"a 'stdin' exceeds 16384 KiB"):
        CodeTask(CodeConfig(**rows(tmp_path, [{"stdin": "x" * (1 + (16 << 20)), "stdout": ""}])))
    for name in ("stdin", "stdout"):
        test = {"stdin": "", "stdout": "", name: "\ud800"}
        with pytest.raises(UsageError, match=rf"a '{name}' holds half of a surrogate pair"):
            CodeTask(CodeConfig(**rows(tmp_path, [test])))


def test_without_namespaces_it_works_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    others = set(descendants())  # such as the workers of another test
    options = SandboxConfig(isolation="rlimits")
    task = CodeTask(CodeConfig(**rows(tmp_path, ADD), options=options))
    assert [r.message.startswith("task.options.isolation=rlimits") for r in caplog.records] == [
        True
    ]
    assert task.score(task.train[0], RIGHT) == 1.0
    session = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(1000)
    os._exit(0)
"""
    assert task.score(task.train[0], session + RIGHT) == 1.0
    assert set(descendants()) <= others


@pytest.mark.parametrize(
    ("forks", "passes"),
    [
        ("if os.fork(): os.wait()", True),  # the fork is through the tests first
        ("if os.fork() == 0: time.sleep(0.3)", True),
        ("if os.fork(): os._exit(0)", False),  # the fork alone is through them
        ("if os.fork(): os.wait(); os._exit(0)", False),
    ],
)
def test_only_the_program_itself_passes(task: CodeTask, forks: str, passes: bool) -> None:
    """A fork runs the tests too: when it comes to their end must not matter."""
    program = f"import os, time\n{forks}\ndef add(a, b):\n    return a + b"
    (given,) = grade(task, [question([ONE])], [program])
    assert given.reward == passes


@pytest.mark.exhaustive
def test_a_thousand_answers_leave_nothing(namespaces: None, tmp_path: Path) -> None:
    task = CodeTask(CodeConfig(**rows(tmp_path, ADD), timeout=60))  # more than a stall takes
    # Flushed, since what a fork still holds is printed twice, the second time when it likes.
    fork = "\nimport os\nos.sys.stdout.flush()\nif os.fork() == 0: os.setsid()"
    answers = [RIGHT, "print(3)", "1 / 0", RIGHT + fork]
    files = len(os.listdir("/proc/self/fd"))
    below = descendants()
    responses = [answers[index % 4] for index in range(1000)]
    found = grade(task, [question(ADD)] * 1000, responses)
    assert [given.reward for given in found[:3]] == [1.0, 0.0, 0.0]
    assert {(i % 4, given.reward) for i, given in enumerate(found)} == {
        (i, found[i].reward) for i in range(4)
    }
    assert set(descendants()) <= set(below)
    assert len(os.listdir("/proc/self/fd")) <= files + 1
