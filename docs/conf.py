"""The documentation site: `make docs` builds it into build/docs with Sphinx, any warning an error.

The root of the sources is the repository, not docs/: a link of a page leads to the same file on the
site as in a checkout, also where it leaves docs/. The pages are Markdown (MyST), the reference
comes from the code: functions from their docstrings, keys from the configuration's classes,
commands from the command line. Nothing is loaded from the network, so the site opens from disk.

Sphinx and not MkDocs Material, which gets no more features and, after November 2026, no fixes,
while its successor is young. Sphinx also takes pages from the whole repository, where MkDocs has
one folder, and reads docstrings without a plugin.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.cli import get_docs_for_click

from sodfast.cli import app as command_line
from sodfast.config.reference import keys_reference

project = "sodfast"
copyright = "the authors of sodfast, Apache-2.0"
release = (Path(__file__).parents[1] / "kernels" / "VERSION").read_text().strip()

root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/*.md",
    "docs/*/*.md",
    "bench/README.md",
    "kernels/README.md",
    "sodfast/configs/studies/README.md",
]
exclude_patterns = [".*", "build", "dist", "runs", "tests"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"sodfast {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_extra"]  # index.html of the root, which leads to the start page
html_copy_source = False
html_show_sphinx = False

# Docstrings are Markdown in all that occurs in them: `code`, lists, indented code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
add_module_names = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"


def commands_reference() -> str:
    """Every command with its arguments and options, as `--help` prints them."""
    group = typer.main.get_command(command_line)
    text: str = get_docs_for_click(obj=group, ctx=typer.Context(group), name="sodfast")
    # The list on top cuts its sentences short, and each command's page has them whole.
    return text[text.index("\n## ") :].replace(" <list[str]>", "")


# What these pages go on with after the words in their files; their titles stand there.
GENERATED: dict[str, Callable[[], str]] = {
    "docs/reference/commands": commands_reference,
    "docs/reference/keys": lambda: keys_reference().partition("\n")[2],
}


def add_generated(app: Any, page: str, source: list[str]) -> None:
    if page in GENERATED:
        source[0] += GENERATED[page]()


def mark_code(app: Any, kind: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Write the `::` that reStructuredText wants before code: before what is indented further than
    the text above it and stands after an empty line."""
    for index in range(len(lines) - 1, 1, -1):
        above, between, line = lines[index - 2 : index + 1]
        if line.strip() and not between.strip() and above.strip() and indent(line) > indent(above):
            lines[index - 1 : index] = ["", " " * indent(above) + "::", ""]


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def setup(app: Any) -> None:
    app.connect("source-read", add_generated)
    app.connect("autodoc-process-docstring", mark_code, priority=100)  # before napoleon
