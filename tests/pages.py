"""Code blocks of the documentation's pages, as a Markdown parser finds them.

The first word after the fence is the language, the others say what a test does with the block:

    python                  runs, top to bottom, in one namespace for the page
    sh                      each command runs; `exit=N`: its exit code, by default 0
    sh parse                needs a GPU, or hours: only parsed
    sh setup                installs or builds: the make target, the package and its extra exist
    LANGUAGE FILE           the block is written to FILE, for the blocks below it
    text                    what a command prints
    {directive}             Sphinx's own, which the strict build checks
"""

import shlex
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


class Block(NamedTuple):
    language: str
    words: tuple[str, ...]
    text: str
    line: int  # of the page, from 1: that of the block's first line

    @property
    def file(self) -> str | None:
        """The file that the block is written to, None for one that is not."""
        if self.language.startswith("{"):
            return None
        return next((word for word in self.words if "." in word and "=" not in word), None)


def blocks(page: str) -> list[Block]:
    """The blocks of a page that is given as text. Raises `ValueError` for one without a fence,
    which could not say what it is."""
    found = []
    for token in MarkdownIt().parse(page):
        if token.type == "code_block":
            assert token.map
            raise ValueError(f"line {token.map[0] + 1}: an indented code block: put it in a fence")
        if token.type == "fence":
            assert token.map
            language, *words = token.info.split() or [""]
            found.append(Block(language, tuple(words), token.content, token.map[0] + 2))
    return found


def commands(text: str) -> list[list[str]]:
    """The words of each command: a line, or several that end with a backslash."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]
