"""The model's keys and the lab's: what a template is given, which layers keep activations."""

from pathlib import Path

import pytest
from configurations import lab, refusal

from sodfast.config import load_config


def test_switches_of_the_chat_template_are_mappings_and_stay_as_they_are(tmp_path: Path) -> None:
    config = lab(
        "model.chat_template_kwargs={enable_thinking: true, note: 'a {b} $c'}",
        "teacher.chat_template_kwargs.levels=[1, 2]",
    )
    assert config.model.chat_template_kwargs == {"enable_thinking": True, "note": "a {b} $c"}
    assert config.teacher.chat_template_kwargs == {"levels": [1, 2]}
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_config(str(file), []) == config
    assert (lab().model.chat_template_kwargs, lab().teacher.chat_template_kwargs) == ({}, None)
    assert "model.chat_template_kwargs" in refusal("model.chat_template_kwargs=[enable_thinking]")


@pytest.mark.parametrize("value", ["-1", "fast", "1.5", "true"])
def test_kept_layers_are_a_count_or_auto(value: str) -> None:
    message = refusal(f"model.kept_layers={value}", "model.gradient_checkpointing=true")
    assert "model.kept_layers" in message


def test_auto_means_nothing_where_all_layers_keep_their_activations() -> None:
    config = load_config("qwen3_8b_80gb", ["model.gradient_checkpointing=false", "memory_gib=null"])
    assert config.model.kept_layers == "auto"


@pytest.mark.parametrize(
    "override", ["lab.passes=[0,1]", "lab.passes=[0.2,0.3,0.5]", "lab.long_passes=1", "lab.heads=3"]
)
def test_what_the_lab_can_do_is_accepted(override: str) -> None:
    assert lab(override) != lab()
