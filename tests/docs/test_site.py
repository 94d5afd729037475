"""The documentation site: built strictly, whole, without the network, and legible in a browser."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import sodfast_kernels
from browsers import open_browser
from pages import PAGES, ROOT

from sodfast.config import load_config

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(find_spec("sphinx") is None, reason="needs the extra docs"),
]


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` calls."""
    words = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    words += ["-d", str(out.with_suffix(".cache")), "-c", str(source / "docs"), str(source)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*words, str(out)], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


class Page(HTMLParser):
    """The targets of a page's links, what it loads, and the names that a link can end at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.names: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {key: value for key, value in attributes if value is not None}
        self.names |= {values[key] for key in ("id", "name") if key in values}
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        elif tag == "link" and values.get("rel") in ("stylesheet", "icon"):
            self.loaded.add(values["href"])
        elif tag in ("script", "img", "iframe", "object") and "src" in values:
            self.loaded.add(values["src"])


@pytest.fixture(scope="module")
def parsed(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_page_is_there(site: Path, parsed: dict[Path, Page]) -> None:
    for page in PAGES:
        assert (site / page.relative_to(ROOT)).with_suffix(".html") in parsed
    assert parsed[site / "index.html"].links == {"docs/index.html"}


def test_no_link_is_dead(site: Path, parsed: dict[Path, Page]) -> None:
    """Files and anchors within the site, also those of the menu, the index and the search page."""
    dead = []
    for path, page in parsed.items():
        for link in page.links | page.loaded:
            parts = urlsplit(link)
            if parts.scheme or link == "#":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file() or (
                parts.fragment
                and target in parsed
                and unquote(parts.fragment) not in parsed[target].names
            ):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert dead == []


def test_nothing_is_loaded_from_the_network(site: Path, parsed: dict[Path, Page]) -> None:
    for path, page in parsed.items():
        foreign = [url for url in page.loaded if urlsplit(url).scheme not in ("", "data")]
        assert foreign == [], path
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:|@import", sheet.read_text()), sheet


def test_the_reference_has_every_public_name(site: Path, parsed: dict[Path, Page]) -> None:
    """Functions of both packages, every command, and every key of the lab's configuration."""
    names = parsed[site / "docs/reference/kernels.html"].names
    for name in set(sodfast_kernels.__all__) - {"modules", "reference"}:
        assert f"sodfast_kernels.{name}" in names
    names = parsed[site / "docs/reference/sodfast.html"].names
    assert {"sodfast.train", "sodfast.Trainer.step", "sodfast.schedule.Decision"} <= names
    commands = (site / "docs/reference/commands.html").read_text()
    for name in ("train", "sweep", "export", "calibrate", "--dry-run", "--launcher"):
        assert name in commands


def test_the_site_without_its_pages_is_not_built(tmp_path: Path) -> None:
    """Strict: a dead link, a missing anchor, a page that is in no menu, a missing picture."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "kernels").mkdir()
    for name in ("kernels/VERSION", "kernels/README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "docs/evidence.md").write_text("# E\n\n[a](gone.md) [b](tasks.md#gone) ![c](d.svg)")
    (tmp_path / "docs/alone.md").write_text("# Alone\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for complaint in ("gone.md", "'gone'", "d.svg", "docs/alone.md"):
        assert complaint in done.stderr


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as running:
        yield running


@pytest.mark.parametrize("width", [400, 1200])
def test_pages_fit_into_the_window(width: int, site: Path, browser: Any) -> None:
    """Every page, from disk: no console message, no request but for files of the site, nothing
    wider than the window."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    messages: list[str] = []
    foreign: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith((site.as_uri(), "data:", "blob:"))
            else foreign.append(request.url)
        ),
    )
    wide = []
    for path in sorted({*site.rglob("*.html")} - {site / "index.html"}):  # which leads on at once
        page.goto(path.as_uri())
        if not page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"):
            wide.append(str(path.relative_to(site)))
    assert (wide, messages, foreign) == ([], [], [])
    page.close()


def test_the_search_works_from_disk(site: Path, browser: Any) -> None:
    page = browser.new_page()
    page.goto((site / "search.html").as_uri() + "?q=isolation")
    page.wait_for_selector("#search-results li a")
    targets = page.eval_on_selector_all("#search-results li a", "all => all.map(e => e.href)")
    assert any("concepts.html" in target for target in targets)
    page.close()


def test_the_picture_of_a_step_can_be_read_at_400_px(site: Path, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 400, "height": 900})
    page.goto((site / "docs/concepts.html").as_uri())
    shown, drawn = page.eval_on_selector(
        "img[src$='step.svg']", "e => [e.getBoundingClientRect().width, e.naturalWidth]"
    )
    (size,) = re.findall(r'font-size="(\d+)"', (ROOT / "docs/step.svg").read_text())
    assert float(size) * shown / drawn >= 12
    page.close()


def test_a_key_of_every_section_is_explained(site: Path) -> None:
    text = (site / "docs/reference/keys.html").read_text()
    for name in load_config("lab").model_dump():
        assert name in text
