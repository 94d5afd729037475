"""The examples of kernels/README.md run as they stand, and the package can be built alone."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

KERNELS = Path(__file__).parents[2] / "kernels"


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", (KERNELS / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    shared: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "kernels/README.md", "exec"), shared)


def test_every_file_of_the_table_exists():
    root = KERNELS.parent
    folders = (root, root / "bench", root / "tests" / "kernels", KERNELS / "sodfast_kernels")
    text = (KERNELS / "README.md").read_text()
    for name in set(re.findall(r"`([\w/]+\.py)`", text)):
        assert any((folder / name).exists() for folder in folders), name


def test_a_distribution_of_its_own():
    project = tomllib.loads((KERNELS / "pyproject.toml").read_text())
    assert project["project"]["name"] == "sodfast-kernels"
    find = project["tool"]["setuptools"]["packages"]["find"]
    folders = {path.parent for path in (KERNELS / "sodfast_kernels").rglob("*.py")}
    found = find_packages(str(KERNELS), include=find["include"])
    assert {name.replace(".", "/") for name in found} == {
        folder.relative_to(KERNELS).as_posix() for folder in folders
    }
    # The folder is a source root: as a package it would shadow Hugging Face's `kernels`.
    assert not (KERNELS / "__init__.py").exists()


@pytest.mark.parametrize("path", sorted((KERNELS / "sodfast_kernels").rglob("*.py")), ids=str)
def test_only_torch_and_triton_are_imported(path):
    allowed = {"torch", "triton", "sodfast_kernels"} | set(sys.stdlib_module_names)
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        assert {name.split(".")[0] for name in names} <= allowed
