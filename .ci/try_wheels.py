"""Install the two wheels of a folder into a fresh environment and use them outside of the checkout.

    python .ci/try_wheels.py dist constraints.txt

The kernels come first and alone: nothing but torch, triton and what these need may come with them,
and every example of their page must run. Then sodfast: it trains the lab for three steps, draws the
report and exports the model. The environment is made by the interpreter that runs this file.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The page of a wheel is in its metadata, so that the examples tried are those that a user gets.
EXAMPLES = """
import re
from importlib.metadata import metadata
page = metadata("sodfast-kernels").get_payload()
blocks = re.findall(r"```python\\n(.*?)```", page, re.DOTALL)
assert len(blocks) >= 5, f"{len(blocks)} examples"
names = {}
for block in blocks:
    exec(block, names)
print(len(blocks), "examples of the kernels' page ran")
"""
PLACES = """
import sys
import sodfast
import sodfast_kernels
for package in (sodfast, sodfast_kernels):
    assert package.__file__.startswith(sys.prefix), package.__file__
"""


def normal(name: str) -> str:
    """The name of a distribution as indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(roots: set[str], report: list[dict[str, Any]]) -> set[str]:
    """Names of distributions that `roots` need without extras, directly or not, and their own.

    `report` is the list `install` of pip's installation report.
    """
    requirements = {
        normal(item["metadata"]["name"]): {
            normal(re.split(r"[^\w.-]", line, maxsplit=1)[0])
            for line in item["metadata"].get("requires_dist", [])
            if "extra ==" not in line
        }
        for item in report
    }
    found: set[str] = set()
    while roots:
        found |= roots
        roots = set().union(*(requirements.get(name, set()) for name in roots)) - found
    return found


def runner(folder: Path) -> Callable[..., None]:
    """What runs a command of the environment `folder`/env in `folder`, without the variables that
    lead elsewhere."""
    commands = folder / "env" / "bin"
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(name: str, *arguments: str) -> None:
        subprocess.run([str(commands / name), *arguments], cwd=folder, env=variables, check=True)

    return run


def use_sodfast(folder: Path) -> None:
    run = runner(folder)
    run("python", "-c", PLACES)
    run("sodfast", "--version")
    run("sodfast", "train", "steps=3", "out=run")
    run("sodfast", "report", "run")
    run("sodfast", "export", "run", "model")
    for file in ("run/report.html", "model/README.md", "model/model.safetensors"):
        assert (folder / file).is_file(), f"{file} is missing"


def try_wheels(wheels: Path, constraints: Path, folder: Path) -> None:
    """Raise `CalledProcessError` or `AssertionError` at the first thing that does not work."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
    run = runner(folder)

    def install(name: str) -> list[dict[str, Any]]:
        (wheel,) = wheels.glob(f"{name}-*.whl")
        report = folder / f"{name}.json"
        options = ["--quiet", "--disable-pip-version-check", "--report", str(report)]
        run("python", "-m", "pip", "install", *options, "-c", str(constraints), str(wheel))
        return list(json.loads(report.read_text())["install"])

    brought = install("sodfast_kernels")
    names = {normal(item["metadata"]["name"]) for item in brought}
    others = names - needed({"torch", "triton"}, brought) - {"sodfast-kernels"}
    assert not others, f"the kernels bring more than torch and triton: {others}"
    run("python", "-c", EXAMPLES)

    install("sodfast")
    run("python", "-m", "pip", "check")
    use_sodfast(folder)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        try_wheels(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), Path(name))
