"""environment.json: what a figure must be quoted with."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from sodfast.run import environment as module
from sodfast.run.environment import describe, environment


def test_environment_names_versions_and_hardware() -> None:
    found = environment(threads=3, device="cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["threads"] == 3 and found["device"] == "cpu"
    assert found["versions"]["torch"].startswith("2.")
    assert found["versions"]["python"] == sys.version.split()[0]
    assert found["cores"] == os.cpu_count()
    assert found["ranks"] == 1 and environment(1, "cuda", ranks=8)["ranks"] == 8
    started = datetime.fromisoformat(found["started"])
    assert started.tzinfo is UTC and abs(datetime.now(UTC) - started) < timedelta(minutes=1)


def test_a_missing_package_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "triton":
            raise PackageNotFoundError(package)
        return f"{package} 1.0"

    monkeypatch.setattr(module, "version", version)
    versions = environment(1, "cpu")["versions"]
    assert versions["triton"] == "not installed" and versions["torch"] == "torch 1.0"


def test_the_commit_is_that_of_the_packages_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the command was started."""
    folder = Path(module.__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    expected = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    monkeypatch.chdir(tmp_path)
    assert (environment(1, "cpu")["commit"] or "") == expected


def test_the_commit_of_another_project_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed sodfast often lies in a .venv within a repository of the user's."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    file = tmp_path / "environment.py"
    file.write_text("")
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)
    monkeypatch.setattr(module, "__file__", str(file))
    assert environment(1, "cpu")["commit"] is None
    subprocess.run([*git, "add", "environment.py"], check=True)
    assert environment(1, "cpu")["commit"]


def test_without_git_or_a_repository_there_is_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "__file__", str(tmp_path / "environment.py"))
    assert environment(1, "cpu")["commit"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(1, "cpu")["commit"] is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nmodel name\t: Some CPU: 3 GHz\n", "Some CPU: 3 GHz"),
        ("flags\t: x\n", None),
    ],
)
def test_the_processor_is_the_kernels_name_for_it(
    text: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where /proc/cpuinfo has no name, as on Arm, Python's own."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(text)
    monkeypatch.setattr(
        module, "Path", lambda name: cpuinfo if name == "/proc/cpuinfo" else Path(name)
    )
    assert environment(1, "cpu")["processor"] == (expected or platform.processor())


def test_an_environment_in_a_line(tmp_path: Path) -> None:
    assert describe(tmp_path) is None
    found = {"processor": "P", "device": "cpu", "threads": 2, "commit": "abc"}
    file = tmp_path / "environment.json"
    file.write_text(json.dumps({**found, "versions": {"python": "3.12", "torch": "2.13"}}))
    assert describe(tmp_path) == "P, cpu, 2 threads; python 3.12, torch 2.13; commit abc"


@pytest.mark.parametrize("text", [b"{", b"[]", b"null", b"\xff", b"", b"[" * 100_000])
def test_a_damaged_environment_says_so(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "environment.json").write_bytes(text)
    assert describe(tmp_path) == "environment.json is damaged"


@pytest.mark.parametrize("versions", [None, 3, [], "x"])
def test_what_an_environment_lacks_is_unknown(tmp_path: Path, versions: object) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"versions": versions, "threads": 1}))
    assert describe(tmp_path) == "unknown, unknown, 1 threads; versions unknown; commit unknown"
