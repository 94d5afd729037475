"""The two distributions: what each holds and needs, and that they work without the checkout. `make
dist` installs them from an index, with all that they need."""

import re
import runpy
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Mapping
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VERSION = (ROOT / "kernels" / "VERSION").read_text().strip()
FOLDERS = {"sodfast": ".", "sodfast_kernels": "kernels"}
PACKAGES = {"sodfast": "sodfast", "sodfast_kernels": "kernels/sodfast_kernels"}
# What builds a wheel, beside the packages themselves.
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "kernels/VERSION")
KERNEL_SOURCES = tuple(f"kernels/{name}" for name in ("pyproject.toml", "README.md", "LICENSE"))
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
ALONE = """
from importlib.util import find_spec
assert find_spec("sodfast_kernels") and not find_spec("sodfast")
"""

# The fixture of the slow tests builds both, which takes seconds.


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, zipfile.ZipFile]:
    """Both wheels, built from a copy of the checkout: a build writes into its folder."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheels")
    for package in PACKAGES.values():
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / package, copy / package, ignore=ignored)
    for name in SOURCES + KERNEL_SOURCES:
        shutil.copy(ROOT / name, copy / name)
    for folder in FOLDERS.values():
        command = [sys.executable, "-c", BUILD, str(out)]
        done = subprocess.run(command, cwd=copy / folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return {name: zipfile.ZipFile(out / f"{name}-{VERSION}-py3-none-any.whl") for name in FOLDERS}


def described(wheel: zipfile.ZipFile, name: str) -> Message:
    return message_from_bytes(wheel.read(f"{name}-{VERSION}.dist-info/METADATA"))


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_a_wheel_holds_its_package_whole_and_nothing_else(
    wheels: Mapping[str, zipfile.ZipFile], name: str
) -> None:
    """Presets, studies, templates, style sheet, the programs that tasks start, py.typed."""
    place = ROOT / PACKAGES[name]
    files = {
        f"{name}/{file.relative_to(place).as_posix()}"
        for file in place.rglob("*")
        if file.is_file() and file.suffix not in (".pyc", ".md")
    }
    held = set(wheels[name].namelist())
    assert {file for file in held if not file.startswith(f"{name}-{VERSION}.dist-info/")} == files
    assert f"{name}-{VERSION}.dist-info/licenses/LICENSE" in held
    assert f"{name}/py.typed" in files


@pytest.mark.slow
def test_what_runs_without_the_checkout_is_inside(wheels: Mapping[str, zipfile.ZipFile]) -> None:
    assert set(wheels["sodfast"].namelist()) >= {
        "sodfast/configs/lab.yaml",
        "sodfast/configs/models.json",
        "sodfast/configs/studies/schedules_lab.yaml",
        "sodfast/report/figure.mplstyle",
        "sodfast/report/page.html.j2",
        "sodfast/report/replay.txt.j2",
        "sodfast/tasks/math_worker.py",
        "sodfast/tasks/sandbox_runner.py",
    }


@pytest.mark.slow
def test_the_kernels_need_torch_and_triton_alone(wheels: Mapping[str, zipfile.ZipFile]) -> None:
    metadata = described(wheels["sodfast_kernels"], "sodfast_kernels")
    assert metadata["Version"] == VERSION
    assert metadata.get_all("Requires-Dist") == [
        "torch>=2.11",
        'triton>=3.6; sys_platform == "linux"',
    ]


@pytest.mark.slow
def test_sodfast_needs_the_kernels_of_its_own_version(
    wheels: Mapping[str, zipfile.ZipFile],
) -> None:
    metadata = described(wheels["sodfast"], "sodfast")
    assert metadata["Version"] == VERSION
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert needed[0] == f"sodfast-kernels=={VERSION}"
    assert all(re.fullmatch(r"[a-z0-9-]+>=[\d.]+", line) for line in needed[1:])
    assert b"sodfast = sodfast.cli:main" in wheels["sodfast"].read(
        f"sodfast-{VERSION}.dist-info/entry_points.txt"
    )


@pytest.mark.slow
def test_both_carry_the_same_license(wheels: Mapping[str, zipfile.ZipFile]) -> None:
    for name, wheel in wheels.items():
        text = wheel.read(f"{name}-{VERSION}.dist-info/licenses/LICENSE")
        assert text == (ROOT / "LICENSE").read_bytes()


@pytest.mark.exhaustive
def test_both_work_outside_of_the_checkout(
    wheels: Mapping[str, zipfile.ZipFile], tmp_path: Path
) -> None:
    """In an environment of their own, where others' packages are those of this one: the examples of
    the kernels' page beside no sodfast, then a run, its report and its export."""
    tools = runpy.run_path(str(ROOT / ".ci" / "try_wheels.py"))
    run = tools["runner"](tmp_path)
    venv.create(tmp_path / "env")
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    # A folder named in a file like this is searched, but no file like this in it is read: those of
    # an editable installation lead to the checkout.
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "others.pth").write_text("".join(f"{path}\n" for path in others))

    def install(name: str) -> None:
        options = ["--quiet", "--no-index", "--no-deps", "--ignore-installed"]
        run("python", "-m", "pip", "install", *options, str(wheels[name].filename))

    install("sodfast_kernels")
    run("python", "-c", f"{tools['EXAMPLES']}{ALONE}")
    install("sodfast")
    tools["use_sodfast"](tmp_path)


def test_what_a_distribution_brings_is_told_from_what_comes_beside_it() -> None:
    """`make dist` refuses kernels that bring more than torch and triton need."""
    needed = runpy.run_path(str(ROOT / ".ci" / "try_wheels.py"))["needed"]
    requirements = {
        "torch": [
            "Typing.Extensions>=4.10",
            'jinja2 ; python_version > "3"',
            "networkx[all]",
            "numpy; extra == 'np'",
        ],
        "jinja2": ["MarkupSafe (>=2.0)"],
        "markupsafe": ["jinja2"],  # a circle ends
        "typing_extensions": [],
        "numpy": [],
    }
    report = [{"metadata": {"name": n, "requires_dist": r}} for n, r in requirements.items()]
    assert needed({"torch", "triton"}, report) == {
        "torch",
        "triton",
        "typing-extensions",
        "jinja2",
        "networkx",
        "markupsafe",
    }
