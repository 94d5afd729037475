"""The report in a real browser."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import open_browser
from marks import exhaustive
from synthetic import (
    SCHEDULES,
    answer,
    lab_run,
    schedule_study,
    write_run,
    write_samples,
    write_study,
)

from sodfast.report.page import write_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as running:
        yield running


def study(directory: Path) -> Path:
    write_study(directory, schedule_study(seeds=2, steps=230), {"cgtr,seed1": 40})
    return directory


def many_groups(directory: Path) -> Path:
    axes = {"schedule": [{"kind": "hard", "every": every} for every in range(1, 13)]}
    write_study(directory, {"base": "lab", "overrides": {"steps": 20}, "axes": axes})
    return directory


def run(directory: Path) -> Path:
    write_run(
        directory, lab_run("steps=230", *(f"schedule.{k}={v}" for k, v in SCHEDULES[1].items()))
    )
    return directory


@pytest.mark.parametrize(
    "make", [study, run, *exhaustive(many_groups)], ids=lambda make: make.__name__
)
def test_a_page_opens_from_disk(make: Any, browser: Any, tmp_path: Path) -> None:
    """No console message, no error, no request but for the file itself; figures that have a size,
    text that lies inside of its figure, and a page no wider than the window."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    path = write_report(make(tmp_path / make.__name__))
    page.goto(path.as_uri())
    page.wait_for_load_state("load")

    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert make.__name__ in page.title()
    boxes = page.eval_on_selector_all(
        "svg", "all => all.map(e => [e.dataset.name, e.getBoundingClientRect().toJSON()])"
    )
    assert len(boxes) >= 9
    for name, box in boxes:
        assert box["width"] > 20 and box["height"] > 10, name
    # What a figure draws has a size, too, and its labels are not cut off.
    outside = page.evaluate(
        """() => [...document.querySelectorAll('svg.plot')].flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text')].filter(text => {
                const box = text.getBoundingClientRect();
                return box.left < frame.left - 2 || box.right > frame.right + 2
                    || box.top < frame.top - 2 || box.bottom > frame.bottom + 2;
            }).map(text => svg.dataset.name + ': ' + text.textContent);
        })"""
    )
    assert outside == []
    empty = page.eval_on_selector_all(
        "svg.plot", "all => all.filter(e => !(e.getBBox().width > 100)).map(e => e.dataset.name)"
    )
    assert empty == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.close()


@pytest.mark.parametrize(
    "make", [study, run, *exhaustive(many_groups)], ids=lambda make: make.__name__
)
def test_a_narrow_page_can_be_read(make: Any, browser: Any, tmp_path: Path) -> None:
    """At 400 px: labels of at least 9 px, in figures and tables that scroll and say so, on a page
    that does not."""
    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.goto(write_report(make(tmp_path / make.__name__)).as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    small = page.evaluate(
        """() => [...document.querySelectorAll('svg.plot')].flatMap(svg => {
            const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
            return [...svg.querySelectorAll('text')]
                .map(text => scale * parseFloat(getComputedStyle(text).fontSize))
                .filter(size => !(size >= 9)).map(size => svg.dataset.name + ': ' + size);
        })"""
    )
    assert small == []
    hints = page.evaluate(
        """() => [...document.querySelectorAll('.scroll')].map(box => [
            box.scrollWidth > box.clientWidth,
            getComputedStyle(box, '::before').content.includes('scroll sideways')])"""
    )
    assert len(hints) >= 9 and all(wider and hint for wider, hint in hints)
    page.close()


def test_a_script_in_an_answer_is_text(browser: Any, tmp_path: Path) -> None:
    """Whatever a model, a row or a task says is shown as letters, and its token keeps its shade."""
    script = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>"
    write_run(tmp_path / "run", lab_run("steps=4"))
    for step in (2, 4):
        hostile = answer(
            step,
            [script, "3", ""],
            id=f"q{script}",
            prompt=script,
            hint="demonstration",
            hint_source=1,
            teacher_prompt=f"{script} hint: {script}{script}",
            divergence=[0.5, 0.02, 0.0],
        )
        write_samples(tmp_path / "run", step, [hostile])
    page = browser.new_page(viewport={"width": 400, "height": 800})
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("dialog", lambda dialog: messages.append(dialog.message))
    path = write_report(tmp_path / "run")
    page.goto(path.as_uri())
    page.wait_for_load_state("load")
    assert messages == [] and page.title() == "run: sodfast report"
    assert page.locator("script, #answers img").count() == 0
    assert page.locator("#answers figcaption").all_text_contents() == [f"q{script}"]
    answers = page.locator("#answers article")
    assert answers.count() == 2
    for text, token, hint in zip(
        page.locator("#answers pre.answer").all_text_contents(),
        page.locator("#answers .answer .d4").all_text_contents(),
        page.locator("#answers pre.hint").all_text_contents(),
        strict=True,
    ):
        assert text == f"{script}3∎" and token == script
        assert hint.startswith("hint (demonstration):") and hint.endswith(f"hint: {script}")
    shade = page.locator("#answers .answer .d4").first.evaluate(
        "e => getComputedStyle(e).backgroundColor"
    )
    assert shade not in ("rgba(0, 0, 0, 0)", "rgb(255, 255, 255)")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.set_viewport_size({"width": 1280, "height": 900})
    left, right = (answers.nth(i).bounding_box() for i in range(2))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]  # side by side
    page.close()
