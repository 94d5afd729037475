"""The layout's traps: the folder `kernels`, what imports what, and what a quick refusal costs."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.machinery import PathFinder
from importlib.metadata import version
from pathlib import Path

import pytest
from marks import slow

import sodfast

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels" / "sodfast_kernels"


def python(code: str, *arguments: str, expect: int = 0) -> str:
    """Run code in a fresh interpreter started in the repository root."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == expect, done.stderr
    return done.stdout


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in `sys.modules` after a statement."""
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    return {name.partition(".")[0] for name in json.loads(python(code).splitlines()[-1])}


def test_the_folder_kernels_is_no_package() -> None:
    """transformers looks for a package `kernels`; a folder with an __init__.py would be found."""
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    found = PathFinder.find_spec("kernels", [str(ROOT)])
    assert found is not None and found.loader is None  # a mere folder, which nobody can mistake


@pytest.mark.slow
def test_transformers_models_import_from_the_repository_root() -> None:
    assert python("from transformers import Qwen3ForCausalLM as m; print(m.__name__)") == (
        "Qwen3ForCausalLM\n"
    )


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).partition(".")[0])
    return names


@pytest.mark.parametrize("file", sorted(KERNELS.rglob("*.py")), ids=lambda file: file.name)
def test_kernels_stand_alone(file: Path) -> None:
    """Reusable alone: torch, triton and the standard library, nothing of the trainer."""
    allowed = {"torch", "triton", "sodfast_kernels"} | set(sys.stdlib_module_names)
    assert imports(file) <= allowed


@pytest.mark.slow
def test_kernels_load_triton_only_when_it_is_used() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
import sodfast_kernels
logits = torch.randn(3, 7)
print(float(sodfast_kernels.distillation_loss(logits, logits, backend="torch").loss))
"""
    assert float(python(code)) == 0.0


def test_the_packages_own_names_are_imported_when_they_are_used() -> None:
    """`import sodfast` loads nothing; a configuration is read without torch."""
    ours = "sorted(m for m in sys.modules if m.startswith('sodfast'))"
    loaded = python(f"import sys, sodfast; print({ours}, 'train' in dir(sodfast))")
    assert loaded == "['sodfast'] True\n"
    heavy = {"torch", "transformers", "triton", "pydantic"}
    assert not loaded_by("import sodfast") & heavy
    opened = "import sodfast; sodfast.load_config('lab', steps=3)"
    assert not loaded_by(opened) & {"torch", "transformers", "triton"}
    assert "has no attribute 'nothing'" in python(
        "import sodfast\ntry:\n    sodfast.nothing\nexcept AttributeError as e:\n    print(e)"
    )


@pytest.mark.parametrize("module", ["schedule", "cli", *slow("config", "errors", "rng", "summary")])
def test_deciding_and_parsing_need_no_torch(module: str) -> None:
    """Bad input is refused, and a recorded run replayed, without loading torch."""
    assert not loaded_by(f"import sodfast.{module}") & {"torch", "transformers", "triton"}


def test_the_version_is_that_of_the_distribution() -> None:
    assert sodfast.__version__ == version("sodfast")
    with pytest.raises(AttributeError, match=r"module 'sodfast' has no attribute 'version'"):
        sodfast.version  # noqa: B018


def lower_bounds(text: str) -> dict[str, str]:
    """Lowest version of each package that a file lists as `"name>=version` or `"name>=version;`."""
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)[";]', text))


def test_the_oldest_versions_tested_are_the_oldest_allowed() -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    ours = lower_bounds((ROOT / "setup.py").read_text())
    project = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text())["project"]
    kernels = lower_bounds(json.dumps(project["dependencies"]))
    assert kernels.keys() == {"torch", "triton"}
    assert ours["torch"] == kernels["torch"]
    for name, lowest in {**kernels, "transformers": ours["transformers"]}.items():
        assert tested[name] == f"{lowest}.0"


COMMAND = """
import sys
sys.argv = ["sodfast", *sys.argv[1:]]
from sodfast.cli import main
try:
    main()
finally:
    heavy = sorted({"torch", "transformers", "triton"} & set(sys.modules))
    print("heavy:", *heavy)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("train --dry-run", 0),
        ("train stepps=3", 2),
        *slow(
            ("--help", 0),
            ("--version", 0),
            ("train --help", 0),
            ("eval --help", 0),
            ("export --help", 0),
            ("train lab steps=3 --dry-run", 0),
            ("train no-such-file.yaml", 2),
            ("train --no-such-option", 2),
        ),
    ],
)
def test_help_dry_run_and_refusals_load_no_torch(arguments: str, code: int) -> None:
    assert python(COMMAND, *arguments.split(), expect=code).splitlines()[-1] == "heavy:"
