"""The model card: what it says of a run, and that nothing of the run's is read as markup."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sodfast.config import Config, load_config
from sodfast.errors import UsageError
from sodfast.run.card import model_card

SUMMARY = {"steps": 150, "final": 0.8125, "peak": 0.82, "status": "done", "refresh_steps": [30]}
ENVIRONMENT = {
    "versions": {"sodfast": "0.1.0", "torch": "2.13.0"},
    "commit": "abc1234",
    "command": ["/home/me/.venv/bin/sodfast", "train", "out=my runs/1"],
    "host": "machine",
}
FENCED = re.compile(r"^(`{3,})(\w+)\n(.*?)\n\1$", re.DOTALL | re.MULTILINE)
# What would end a table, a code block, a heading or the front matter, or be read as markup.
NASTY = "a`b ```` |\n---\n# heading\n```\n<script>alert(1)</script>\n![x](y) 'q\" : {z} é\u2028"


def record(run: Path, summary: Any = SUMMARY, environment: Any = ENVIRONMENT) -> Path:
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "environment.json").write_text(json.dumps(environment))
    return run


def blocks(card: str) -> list[tuple[str, Any]]:
    """Language and content of every code block, YAML parsed."""
    return [
        (language, yaml.safe_load(text) if language == "yaml" else text)
        for _, language, text in FENCED.findall(card)
    ]


def front_matter(card: str) -> Any:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.fixture
def config() -> Config:
    return load_config("lab", ["schedule.kind=hard", "schedule.every=7"])


def test_a_card_names_task_schedule_figures_command_and_versions(
    config: Config, tmp_path: Path
) -> None:
    card = model_card(record(tmp_path), config, 140)
    assert front_matter(card)["library_name"] == "transformers"
    assert "sodfast" in front_matter(card)["tags"]
    assert "after step 140." in card and "mean@16" in card
    (_, origin), (_, schedule), (_, figures), (_, command), (_, machine) = blocks(card)
    assert origin["task"] == config.task.model_dump(mode="json")
    assert origin["model"]["path"] is None and origin["lab"]["hidden_size"] == 128
    assert schedule == {"schedule": {"kind": "hard", "every": 7}}
    assert figures == SUMMARY
    assert command == "sodfast train 'out=my runs/1'"
    assert machine == {"versions": ENVIRONMENT["versions"], "commit": "abc1234"}


def test_the_lab_is_named_only_where_it_is_the_model(tmp_path: Path) -> None:
    config = load_config("lab", ["model.random=Qwen/Qwen3-8B"])
    (_, origin), *_ = blocks(model_card(record(tmp_path), config, 1))
    assert origin["model"]["random"] == "Qwen/Qwen3-8B" and origin.keys() == {"model", "task"}


def test_no_name_of_a_users_is_read_as_markup(tmp_path: Path) -> None:
    """Every text comes back whole from a code block, and outside of these none of it is left."""
    values = load_config("lab", []).model_dump(mode="json")
    values["model"]["path"] = NASTY
    values["task"]["stop"] = [NASTY]
    environment = {**ENVIRONMENT, "command": ["sodfast", "train", NASTY], "commit": NASTY}
    run = record(tmp_path, {**SUMMARY, NASTY: NASTY}, environment)
    card = model_card(run, Config.model_validate(values), 1)
    (_, origin), _, (_, figures), (_, command), (_, machine) = blocks(card)
    assert origin["model"]["path"] == NASTY and origin["task"]["stop"] == [NASTY]
    assert figures[NASTY] == NASTY and machine["commit"] == NASTY
    assert NASTY.replace("'", "'\"'\"'") in command
    plain = model_card(record(tmp_path), load_config("lab", []), 1)
    assert FENCED.sub("", card) == FENCED.sub("", plain)


def test_bytes_that_are_no_character_are_escaped(config: Config, tmp_path: Path) -> None:
    """A path need not be UTF-8; the card is."""
    run = record(tmp_path, environment={"command": ["sodfast", "train", "out=\udcff"]})
    assert blocks(model_card(run, config, 1))[3] == ("sh", "sodfast train 'out=\\udcff'")


@pytest.mark.parametrize("command", [None, [], "sodfast train", 3])
def test_an_environment_without_a_command_names_none(
    config: Config, tmp_path: Path, command: Any
) -> None:
    run = record(tmp_path, environment={**ENVIRONMENT, "command": command})
    assert [language for language, _ in blocks(model_card(run, config, 1))] == ["yaml"] * 4


def test_a_program_that_is_not_sodfast_keeps_its_name(config: Config, tmp_path: Path) -> None:
    run = record(tmp_path, environment={"command": ["mine.py", "3"]})
    assert ("sh", "mine.py 3") in blocks(model_card(run, config, 1))


def test_what_is_missing_is_said_and_what_is_damaged_refused(
    config: Config, tmp_path: Path
) -> None:
    card = model_card(tmp_path, config, 1)
    assert "no summary.json: it had not ended" in card and "no environment.json" in card
    for name in ("summary.json", "environment.json"):
        record(tmp_path)
        (tmp_path / name).write_text("{")
        with pytest.raises(UsageError, match=name):
            model_card(tmp_path, config, 1)
