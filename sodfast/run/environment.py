"""What a run was made with: versions, commit and hardware, for environment.json."""

import datetime
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sodfast.errors import UsageError
from sodfast.files import read_object

OURS = ("sodfast", "sodfast-kernels")  # the two distributions of this repository


def environment(threads: int, device: str, ranks: int = 1) -> dict[str, Any]:
    """Versions, commit, hardware, processes and threads: to be quoted with any figure of a run."""
    packages = [*OURS, "torch", "triton", "transformers", "peft", "tokenizers", "numpy", "pydantic"]
    return {
        "versions": {"python": platform.python_version(), **versions(packages)},
        "commit": _commit(),
        "command": sys.argv,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "ranks": ranks,
        "threads": threads,
        "device": device,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def describe(run: Path) -> str | None:
    """What a report says of a run's environment.json; None where there is none."""
    try:
        found = read_object(run / "environment.json")
    except FileNotFoundError:
        return None
    except UsageError:
        return "environment.json is damaged"
    versions = found.get("versions")
    named = versions.items() if isinstance(versions, dict) else [("versions", "unknown")]
    known = {key: found.get(key, "unknown") for key in ("processor", "device", "threads", "commit")}
    return (
        "{processor}, {device}, {threads} threads; ".format(**known)
        + ", ".join(f"{name} {text}" for name, text in named)
        + f"; commit {known['commit']}"
    )


def versions(packages: Iterable[str] = OURS) -> dict[str, str]:
    """The installed version of each distribution, or "not installed"."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str | None:
    """The commit of the checkout that this file belongs to. An installed package has none, also
    where its environment lies within the repository of another project."""
    file = Path(__file__)
    git = ["git", "-C", str(file.parent)]
    try:
        held = subprocess.run(
            [*git, "ls-files", "--error-unmatch", file.name], capture_output=True, check=False
        )
        if held.returncode != 0:
            return None
        done = subprocess.run(
            [*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
