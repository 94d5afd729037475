"""What a run was made with: versions, commit and hardware, for environment.json."""

import datetime
import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def environment(threads: int, device: str, ranks: int = 1) -> dict[str, Any]:
    """Versions, commit, hardware, processes and threads: to be quoted with any figure of a run."""
    packages = ["sodfast", "torch", "triton", "transformers", "peft", "tokenizers"]
    packages += ["numpy", "pydantic"]
    return {
        "versions": {"python": platform.python_version(), **_versions(packages)},
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


def _versions(packages: list[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
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
