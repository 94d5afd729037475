"""The pages and files for contributors: what they name exists, and what they repeat agrees."""

import importlib
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import blocks

import sodfast

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sodfast"
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "sodfast/configs/studies/README.md",
    *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")),
)
FOLDERS = ("sodfast", "kernels", "tests", "bench", "docs", ".ci", ".github")
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").iterdir())


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def read_project(folder: str) -> dict[str, Any]:
    return dict(tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"])


def section(page: str, title: str) -> str:
    """The text of a page below the heading `title`, up to the next heading of its level."""
    text = (ROOT / page).read_text()
    return text.split(f"\n## {title}", 1)[1].split("\n## ", 1)[0]


def mentioned(page: Path) -> set[str]:
    """What a page names as files: targets of its links, paths from the root, Python files."""
    text = page.read_text()
    links = set(re.findall(r"\]\(([^)#]+)\)", text))
    words = {word.rstrip(".") for word in re.findall(r"[\w./-]+", text)}
    paths = {word for word in words if word.startswith(tuple(f"{f}/" for f in FOLDERS))}
    python = {word for word in words if word.endswith(".py")}
    return {link for link in links if "://" not in link} | paths | python


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_mentions_exists(page: str) -> None:
    """A path is from the root, from the page's folder, or, for Python files, from `sodfast`. A
    tutorial may write files of its own."""
    names = mentioned(ROOT / page)
    if page.startswith("docs/"):
        names -= {block.file for block in blocks((ROOT / page).read_text())}
    else:
        assert names
    folders = (ROOT, (ROOT / page).parent, PACKAGE)
    missing = [n for n in sorted(names) if not any((folder / n).exists() for folder in folders)]
    assert not missing, f"{page} mentions what does not exist: {missing}"


def test_a_missing_path_would_be_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[a](gone/page.md), `sodfast/gone.yaml`, gone.py. [b](https://x.org/c.md)")
    assert mentioned(page) == {"gone/page.md", "sodfast/gone.yaml", "gone.py"}


def tree_of_readme() -> dict[str, str]:
    """Entries of the README's tree below `sodfast/`, with their descriptions."""
    block = section("README.md", "The code, in reading order").split("    sodfast/\n", 1)[1]
    entries: dict[str, str] = {}
    name = ""
    for line in block.split("\n    kernels/", 1)[0].splitlines():
        if found := re.fullmatch(r" {6}([\w./]+) +(\S.*)", line):
            name, entries[found[1]] = found[1], found[2]
        else:
            entries[name] += " " + line.strip()
    return entries


def test_the_readme_names_every_module_of_sodfast() -> None:
    entries = tree_of_readme()
    text = " ".join([*entries, *entries.values()])
    for file in PACKAGE.glob("*.py"):
        if file.name != "__init__.py":
            assert file.name in text, f"README.md's tree lacks {file.name}"
    rooms = {file.parent for file in PACKAGE.glob("*/__init__.py")}
    assert {name for name in entries if name.endswith("/")} == {f"{r.name}/" for r in rooms}
    for room in rooms:
        listed = entries[f"{room.name}/"].rpartition(": ")[2].split(", ")
        files = {file.stem for file in room.glob("*.py") if file.stem != "__init__"}
        modules = sorted(files | {file.parent.name for file in room.glob("*/__init__.py")})
        assert listed == modules, f"README.md's tree lists other modules of {room.name}/"


def test_the_contributors_page_has_a_sentence_for_every_room() -> None:
    rows = set(
        re.findall(r"^\| `(\S+)/` \|", section("CONTRIBUTING.md", "The rooms"), re.MULTILINE)
    )
    rooms = {f"sodfast/{file.parent.name}" for file in PACKAGE.glob("*/__init__.py")}
    assert rows == rooms | {"sodfast", "kernels/sodfast_kernels"}


def test_the_code_that_the_readme_cites_for_each_measure_exists() -> None:
    table = section("README.md", "What is measured, exactly")
    cited = re.findall(r"\| `([\w.]+)` \|$", table, re.MULTILINE)
    assert len(cited) >= 10
    for name in cited:
        if name.endswith(".py"):
            continue  # a path, which is tested above
        parts = name.split(".")
        depth = 2 if (PACKAGE / parts[0]).is_dir() else 1
        value: Any = importlib.import_module(".".join(["sodfast", *parts[:depth]]))
        for part in parts[depth:]:
            value = getattr(value, part)


def test_the_changelog_sends_importers_to_modules_that_exist() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    rows = re.findall(r"^\| (`sodfast\..*) \| (`.*) \|$", text, re.MULTILINE)
    assert len(rows) > 20
    for _, now in rows:
        for name in re.findall(r"`(sodfast\.[a-z_.]+)`", now):
            assert find_spec(name), f"CHANGELOG.md names {name}"


def test_no_list_of_an_extra_is_written_twice() -> None:
    extras = read_project(".")["optional-dependencies"]
    lists = [tuple(sorted(needed)) for needed in extras.values()]
    assert len(set(lists)) == len(lists)
    assert extras["hub"] == ["sodfast[datasets]"]


def test_versions_agree() -> None:
    """Of both distributions it is in kernels/VERSION; tests/test_wheels.py holds what they get."""
    version = (ROOT / "kernels" / "VERSION").read_text().strip()
    assert sodfast.__version__ == version, "make .venv/ready installs what has changed"
    for folder, file in ((".", "kernels/VERSION"), ("kernels", "VERSION")):
        project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())
        assert "version" in project["project"]["dynamic"]
        assert project["tool"]["setuptools"]["dynamic"]["version"] == {"file": file}
    assert read_yaml("CITATION.cff")["version"] == version
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", changelog, re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1] == (version, str(read_yaml("CITATION.cff")["date-released"]))


def test_the_citation_has_what_its_format_requires() -> None:
    """Required keys of the Citation File Format 1.2.0, of the file and of each reference."""
    citation = read_yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"authors", "message", "title"} <= citation.keys()
    assert citation["license"] == read_project(".")["license"] == read_project("kernels")["license"]
    assert [r["url"].rpartition("/")[2] for r in citation["references"]] == [
        "2606.03532",
        "2601.20802",
    ]
    for reference in citation["references"]:
        assert {"authors", "title", "type"} <= reference.keys()


def test_hooks_take_their_tools_from_the_environment_of_the_tests() -> None:
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    # `ruff format --check` in the Makefile is `ruff format` here: a hook mends what it finds.
    entries = [hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]]
    assert entries == ["ruff format", "ruff check", "mypy"]
    lint = (ROOT / "Makefile").read_text().split("\nlint:", 1)[1].split("\n\n", 1)[0]
    assert all(f"$(BIN)/{entry}" in lint for entry in entries)


def test_the_workflow_runs_what_anybody_can_run() -> None:
    workflow = read_yaml(".github/workflows/ci.yml")
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert job["timeout-minutes"] == 45
    (versions,) = [s["with"]["python-version"] for s in job["steps"] if "setup-python" in str(s)]
    assert set(versions.split()) == {"3.11", "3.12"}
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda file: file.stem)
def test_issue_forms_have_what_the_format_requires(template: Path) -> None:
    form = yaml.safe_load(template.read_text())
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    for field in form["body"]:
        assert field["attributes"]["label"]
    assert any(field.get("validations", {}).get("required") for field in form["body"])
