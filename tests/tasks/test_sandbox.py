"""The host's side of the sandbox: what an outcome says, and where there can be no sandbox."""

from pathlib import Path
from typing import Any

import pytest

from sodfast.errors import UsageError
from sodfast.tasks import sandbox as module
from sodfast.tasks.sandbox import Limits, Outcome, Sandbox, require_sandbox
from sodfast.tasks.worker import WorkerEnded

LIMITS = Limits("namespaces", 256 << 20, 8)
PLAIN = Limits("rlimits", 256 << 20, 8)


def test_where_programs_cannot_be_kept_apart_the_user_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "PROGRAM", tmp_path / "runner.py")
    (tmp_path / "runner.py").write_text("import sys\nsys.exit('unshare: not permitted')\n")
    with pytest.raises(UsageError, match=r"\(unshare: not permitted\).*task\.options\.isolation"):
        require_sandbox(LIMITS)
    with pytest.raises(WorkerEnded, match="unshare: not permitted"):
        Sandbox(LIMITS, 5)


def test_a_sandbox_that_is_lost_is_an_outcome(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "PROGRAM", tmp_path / "runner.py")
    text = "print('{\"ready\": true}', flush=True)\ninput()\ninput()\n"
    (tmp_path / "runner.py").write_text(text)
    with Sandbox(LIMITS, 5) as sandbox:
        assert sandbox.run("print(1)") == Outcome("lost")
    text += "import time; time.sleep(60)\n"
    (tmp_path / "runner.py").write_text(text)
    monkeypatch.setattr(module, "GRACE", 0.1)
    with Sandbox(LIMITS, 1) as sandbox:
        assert sandbox.run("print(1)") == Outcome("lost")
        assert sandbox.run("print(1)").ended in ("lost", "time")


@pytest.mark.parametrize("limits", [PLAIN, LIMITS], ids=["rlimits", "namespaces"])
def test_outcomes(limits: Limits, request: Any) -> None:
    if limits is LIMITS:
        request.getfixturevalue("namespaces")
    with Sandbox(limits, 20) as sandbox:
        assert sandbox.run("print(input() * 2)", "ab\n") == Outcome("exit", 0, "abab\n")
        assert sandbox.run("exit(3)") == Outcome("exit", 3)
        assert sandbox.run("import sys; sys.exit('no')") == Outcome("exit", 1, "", "no\n")
        outcome = sandbox.run("print(1)\n1 / 0")
        assert (outcome.code, outcome.stdout) == (1, "1\n")
        assert outcome.stderr.startswith(
            'Traceback (most recent call last):\n  File "answer.py", l'
        )
        assert outcome.stderr.endswith("ZeroDivisionError: division by zero\n")
        assert sandbox.test("x = 3", ["assert x == 3", "assert x > 2"]) == Outcome(
            "exit", 0, passed=True
        )
        failed = sandbox.test("x = 3", ["assert x == 3", "assert x == 2"])
        assert not failed.passed and 'File "test_2.py", line 1' in failed.stderr
        assert "assert x == 2" in failed.stderr and "sandbox_runner" not in failed.stderr


@pytest.mark.slow
def test_the_time_is_that_of_all_programs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    with Sandbox(PLAIN, 3.0) as sandbox:
        assert sandbox.run("import time; time.sleep(0.5)").ended == "exit"
        assert sandbox.run("import time; time.sleep(2.8)").ended == "time"
        monkeypatch.setattr(sandbox, "_deadline", 0.0)
        assert sandbox.run("print(1)").ended == "time"
