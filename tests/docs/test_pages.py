"""Every code block and every command of the pages in docs/ runs, or is parsed where it says so.

A page runs in a folder of its own in which `examples/` lies as in a checkout, `DIR_OR_HUB_ID` is
the tiny model, and rows lie that it may replace. What it starts from the presets `lab` and `base`
is made small by one rule, `SMALL`, whatever the page sets itself winning over it.
"""

import re
import sys
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from marks import exhaustive, slow
from pages import PAGES, ROOT, Block, blocks, commands

import sodfast.api
import sodfast.config
from sodfast.cli import app
from sodfast.config import load_config
from sodfast.study.definition import find_study, load_study

SMALL = [
    "steps=6",
    "rollout.prompts_per_step=4",
    "rollout.max_new_tokens=16",
    "optimizer.lr=2e-3",
    "eval.samples=2",
    "collapse.eval_floor=0",
    "collapse.eval_fraction=0",
]
NEEDED = {"docs/trl.md": "trl"}  # packages that only an extra brings
PATHS = [str(page.relative_to(ROOT)) for page in PAGES]
LONG = ["docs/tutorials/lab.md", "docs/tutorials/qwen3_8b.md"]


def small(tiny_model: Path, overrides: Sequence[str] = (), values: Any = ()) -> list[str]:
    """Overrides that make a run of seconds: the tiny model, few questions, short answers."""
    keys = [*SMALL, f"model.path={tiny_model}"]
    named = {text.split("=")[0] for text in overrides} | set(values)
    if not any(name == "task" or name.startswith("task.") for name in named):
        keys += ["task.train=48", "task.test=8"]
    return [text for text in keys if text.split("=")[0] not in named]


@pytest.fixture
def shrunk(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is loaded from the presets `lab` and `base` in this process is small."""

    def load(source: Any = None, overrides: Sequence[str] = (), **values: Any) -> Any:
        few = small(tiny_model, overrides, values) if source in (None, "lab", "base") else []
        return load_config(source, [*few, *overrides], **values)

    for module in (sodfast.config, sodfast.api):
        monkeypatch.setattr(module, "load_config", load)


def parse(words: list[str]) -> None:
    """Let the command line read a command without running it. A configuration that `train` names
    is resolved, too, and a study that `sweep` names is expanded."""
    group = typer.main.get_command(app)
    context = group.make_context("sodfast", list(words))
    name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    assert command is not None
    command.make_context(name, list(rest), parent=context)
    arguments = [word for word in rest if not word.startswith("--")]
    if name == "train" and "--resume" not in rest:
        source = arguments.pop(0) if arguments and "=" not in arguments[0] else None
        load_config(source, arguments)
    if name == "sweep":
        others = [word for word in arguments if "=" in word and not word.startswith("out=")]
        load_study(find_study(arguments[0]), others)


def unlaunched(words: list[str]) -> list[str]:
    """What sodfast is given, also by torchrun; `python FILE` is left with the file alone."""
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    assert words[0] in ("sodfast", "python"), f"a test cannot run {words[0]}"
    return words


def check(words: list[str]) -> None:
    """A command that no test runs: sodfast's are parsed; of others what they name must exist, a
    make target, an extra of a folder of the checkout, a script and its options."""
    program, *arguments = words
    if program in ("sodfast", "torchrun"):
        parse([word for word in unlaunched(words)[1:] if word != "..."])
    elif program == "make":
        targets = (ROOT / "Makefile").read_text()
        for target in arguments:
            assert "=" in target or re.search(rf"^{target}:", targets, re.MULTILINE), target
    elif words[:2] == ["pip", "install"]:
        for word in words[2:]:
            if word != "-e":
                check_requirement(word)
    else:
        assert program in ("python", "python3"), f"a test cannot check {' '.join(words)}"
        if arguments[0] == "-m":
            assert arguments[1] in ("pip", "pytest"), arguments
            return
        script = (ROOT / arguments[0]).read_text()
        for word in arguments[1:]:
            assert not word.startswith("--") or f'"{word}"' in script, f"{arguments[0]} {word}"


def check_requirement(word: str) -> None:
    """`.[EXTRA]`, `./FOLDER` or, of an index, `sodfast[EXTRA]`."""
    found = re.fullmatch(r"(?:sodfast(?=\[)|(\.?[\w/]*?)/?)(?:\[([\w,]+)\])?", word)
    assert found, f"{word} is no folder of the checkout"
    project = tomllib.loads((ROOT / (found[1] or ".") / "pyproject.toml").read_text())["project"]
    extras = set((found[2] or "").split(",")) - {""}
    assert extras <= project.get("optional-dependencies", {}).keys()


def run_commands(block: Block, cli: Any, tiny_model: Path) -> None:
    expected = next((int(w.split("=")[1]) for w in block.words if w.startswith("exit=")), 0)
    for words in commands(block.text):
        program, *arguments = unlaunched(words)
        assert program == "sodfast", f"line {block.line}: a test runs sodfast alone"
        if arguments[0] == "sweep":  # its trials are processes of their own
            arguments += small(tiny_model, arguments)
        done = cli(*arguments)
        assert done.code == expected, f"{' '.join(words)}\n{done.out}\n{done.err}"


def lay_out(folder: Path) -> None:
    """What pages take for granted."""
    (folder / "examples").symlink_to(ROOT / "examples")
    for name in ("rows.jsonl", "train.jsonl", "test.jsonl"):
        lines = [f'{{"prompt": "{left}*2+1=", "answer": "{2 * left + 1}"}}\n' for left in range(4)]
        (folder / name).write_text("".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [*(path for path in PATHS if path not in LONG), *exhaustive(*LONG)]
)
def test_a_page_runs_from_top_to_bottom(
    path: str,
    cli: Any,
    shrunk: None,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if path in NEEDED:
        pytest.importorskip(NEEDED[path], reason=f"needs the extra {NEEDED[path]}")
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path)
    (tmp_path / "DIR_OR_HUB_ID").symlink_to(tiny_model)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of a sweep's trials
    namespace: dict[str, Any] = {"__name__": path}
    for block in blocks((ROOT / path).read_text()):
        place = f"{path}:{block.line}"
        match block.language, block.words:
            case _, _ if block.file is not None:
                (tmp_path / block.file).write_text(block.text)
                if block.language == "python":
                    compile(block.text, place, "exec")
            case "python", ():
                # Empty lines before it, so that a traceback has the page's line numbers.
                exec(compile("\n" * (block.line - 1) + block.text, path, "exec"), namespace)
            case "sh", ("parse" | "setup",):
                for words in commands(block.text):
                    check(words)
            case "sh", _:
                run_commands(block, cli, tiny_model)
            case "yaml", ():
                yaml.safe_load(block.text)
            case "text", ():
                pass
            case language, _ if re.fullmatch(r"\{[\w-]+\}", language):
                pass
            case _:
                pytest.fail(f"{place}: nothing says what to do with ```{block.language}")


INDENTED = r"^    ((?:{}) (?:.*\\\n)*.*)$"  # a command, and the lines that it goes on over
PROGRAMS = "sodfast|torchrun|python3?|pip|make"


@pytest.mark.parametrize(
    ("page", "least"),
    [("bench/README.md", 8), *slow(("README.md", 40), ("sodfast/configs/studies/README.md", 2))],
)
def test_commands_of_other_pages_are_parsed(
    page: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their blocks are indented: each command is one that the command line takes."""
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path)
    (tmp_path / "my.yaml").write_text("base: lab\n")
    (tmp_path / "study.yaml").write_text(indented("README.md", "base: lab"))
    found = re.findall(INDENTED.format(PROGRAMS), (ROOT / page).read_text(), re.MULTILINE)
    assert len(found) >= least
    for line in found:
        for words in commands(line):
            check(words)


def indented(page: str, first: str) -> str:
    """The one indented block of a page whose first line begins with `first`."""
    text = (ROOT / page).read_text()
    (found,) = re.findall(rf"^\n(    {re.escape(first)}.*\n(?:    .*\n)*)", text, re.MULTILINE)
    return textwrap.dedent(found)


@pytest.mark.slow
def test_the_readmes_python_runs(
    shrunk: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    left: dict[str, Any] = {}
    exec(indented("README.md", "import sodfast"), left)
    assert len(left["rewards"]) == 20 and left["line"]["step"] == 1
    assert left["run"].metrics[-1]["step"] == 40


@pytest.mark.slow
def test_the_readmes_lines_for_trl_run(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs the extra trl")
    from trl_trainers import build_trainer

    from sodfast.integrations import trl

    names = {
        "SDPOTrainer": lambda *_: build_trainer("sdpo", tiny_model, tmp_path),
        "use_fused_loss": trl.use_fused_loss,
        "TeacherScheduleCallback": trl.TeacherScheduleCallback,
    }
    exec(indented("README.md", "trainer = SDPOTrainer"), names)


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("```python\nx = 1\n```\n", [("python", (), "x = 1\n", 2)]),
        ("a\n\n```sh exit=1\ny\n```\n", [("sh", ("exit=1",), "y\n", 4)]),
        ("* a\n\n  ```yaml a.yaml\n  b: 1\n  ```\n", [("yaml", ("a.yaml",), "b: 1\n", 4)]),
        ("````text\n```sh\nx\n```\n````\n", [("text", (), "```sh\nx\n```\n", 2)]),
        ("```\nx\n```\n", [("", (), "x\n", 2)]),
    ],
)
def test_blocks_are_found(page: str, expected: list[tuple[Any, ...]]) -> None:
    assert [tuple(block) for block in blocks(page)] == expected


def test_a_block_that_cannot_say_what_it_is_is_refused() -> None:
    with pytest.raises(ValueError, match="line 3: an indented code block"):
        blocks("a\n\n    sodfast train\n")


def test_commands_may_span_lines() -> None:
    text = "sodfast train steps=3 \\\n    'a=[b, c]'  # a remark\n\nmake docs\n"
    assert commands(text) == [["sodfast", "train", "steps=3", "a=[b, c]"], ["make", "docs"]]


@pytest.mark.parametrize(
    "words",
    [["train", "stpes=3"], ["train", "--dry-rnu"], ["trian"], ["fork"], ["show", "a", "--limit=b"]],
)
def test_a_wrong_command_is_not_parsed(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"stpes|such|Missing|valid"):
        parse(words)


@pytest.mark.parametrize(
    "words",
    [
        ["make", "dosc"],
        ["pip", "install", "./kernel"],
        ["pip", "install", ".[lroa]"],
        ["pip", "install", "sodfast[lroa]"],
        ["python", "bench/gpu_siute.py"],
        ["python", "bench/gpu_suite.py", "--reherse"],
        ["rm", "x"],
    ],
)
def test_a_wrong_name_is_found(words: list[str]) -> None:
    with pytest.raises((AssertionError, OSError)):
        check(words)


def test_what_a_page_sets_wins_over_what_makes_it_small(tiny_model: Path, shrunk: None) -> None:
    config = sodfast.config.load_config("lab", ["steps=40"], eval={"samples": 4})
    assert (config.steps, config.eval.samples, config.rollout.prompts_per_step) == (40, 4, 4)
    assert config.task.train == 48 and config.model.path == str(tiny_model)
    assert sodfast.config.load_config("qwen3_8b_80gb").model.path == "Qwen/Qwen3-8B"
    assert sys.modules["sodfast.api"].load_config is sodfast.config.load_config
