"""The model card of an exported student: what it learned from, under which schedule, its figures.

The format is that of the Hugging Face hub: YAML between lines of dashes, then Markdown. What a user
has written (paths, prompts, the command) stands in fenced blocks alone, where nothing is markup.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from sodfast.config import Config
from sodfast.files import read_object
from sodfast.run.environment import versions
from sodfast.run.records import read_summary

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- sodfast
- self-distillation
- on-policy-distillation
---

# A language model trained by self on-policy distillation

The student of a run of sodfast after step {step}. It learned from the rewards of its own answers
and from a teacher that is an earlier copy of itself. `AutoModelForCausalLM` and `AutoTokenizer` of
transformers load this folder. Written by sodfast {version}.

## What it began as, and what it was asked

{origin}

## When its teacher moved

{schedule}

## Figures

{figures}

## How to repeat it

{command}
"""
_FIGURES = """\
From summary.json of the run. `final` and `peak` are mean@{samples} of its last and its best
evaluation: the mean reward of {samples} answers to each held-out question.

{block}"""


def model_card(run: Path, config: Config, step: int) -> str:
    """The card of the student that the run in `run` had after `step`, in UTF-8.

    Raises `UsageError` where summary.json or environment.json is damaged; one that is missing, as
    the summary of a run that has not ended, is said to be.
    """
    origin = {"model", "task"}
    if config.model.path is None and config.model.random is None:
        origin.add("lab")
    summary = read_summary(run)
    return _CARD.format(
        step=step,
        version=versions()["sodfast"],
        origin=_yaml(config.model_dump(mode="json", include=origin)),
        schedule=_yaml(config.model_dump(mode="json", include={"schedule"})),
        figures="The run has no summary.json: it had not ended."
        if summary is None
        else _FIGURES.format(samples=config.eval.samples, block=_yaml(summary)),
        command=_command(run),
    )


def _command(run: Path) -> str:
    """The command that began the run, and the versions and the machine that it ran on."""
    try:
        found = read_object(run / "environment.json")
    except FileNotFoundError:
        return "The run has no environment.json."
    named = ("versions", "commit", "processor", "device", "ranks", "threads", "started")
    blocks = [_yaml({key: found[key] for key in named if key in found})]
    if (words := found.get("command")) and isinstance(words, list):
        program, *arguments = map(str, words)
        # As it was typed: not where sodfast is installed.
        if Path(program).name in ("sodfast", "__main__.py"):
            program = "sodfast"
        blocks.insert(0, _fenced(shlex.join([program, *arguments]), "sh"))
    return "\n\n".join(blocks)


def _yaml(values: dict[str, Any]) -> str:
    return _fenced(yaml.safe_dump(values, sort_keys=False).rstrip(), "yaml")


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any that `text` could close it with.

    A byte that is no character, as a path may have, is written as its escape.
    """
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    printable = text.encode(errors="backslashreplace").decode()
    return f"{fence}{language}\n{printable}\n{fence}"
