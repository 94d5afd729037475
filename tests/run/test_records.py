"""What a run has recorded is read whole, or refused in one line that names the place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sodfast.errors import UsageError
from sodfast.run.records import read_events, read_metrics, read_summary

METRICS = ['{"step": 0, "eval/mean@2": 0.5}', '{"step": 1, "reward/mean": 1, "length/mean": 7.5}']
GATE = {"value": 3, "threshold": 2.5, "pass": True, "active": True}
EVENTS: list[dict[str, Any]] = [
    {"step": 0, "event": "checkpoint"},
    {"step": 2, "event": "gate", "gates": {"isolation": GATE}, "refresh": True},
    {"step": 2, "event": "refresh", "shock": 0.25, "age": 2},
    {"step": 3, "event": "collapse", "reason": "eval", "value": 0.0, "threshold": 0.01},
]
SUMMARY = {"steps": 3, "status": "done", "final": 0.5}


def refusal(read: Callable[[Path], Any], run: Path) -> str:
    with pytest.raises(UsageError) as error:
        read(run)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_sound_run_is_read_as_it_is(tmp_path: Path) -> None:
    assert (read_metrics(tmp_path), read_events(tmp_path), read_summary(tmp_path)) == ([], [], None)
    (tmp_path / "metrics.jsonl").write_text("\n".join(METRICS) + "\n")
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in EVENTS))
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    assert read_metrics(tmp_path) == [json.loads(text) for text in METRICS]
    assert (read_events(tmp_path), read_summary(tmp_path)) == (EVENTS, SUMMARY)


def test_a_reward_gate_without_a_reference_has_no_threshold(tmp_path: Path) -> None:
    gate = {"value": 0.5, "pass": False, "active": True}
    event = {"step": 1, "event": "gate", "gates": {"reward": gate}, "refresh": False}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert read_events(tmp_path) == [event]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (b"[1, 2]", "no object with a step"),
        (b"null", "no object with a step"),
        (b'{"reward/mean": 0.5}', "no object with a step"),
        (b'{"step": true}', "no object with a step"),
        (b'{"step": -1}', "no object with a step"),
        (b'{"step": ' + b"9" * 400 + b"}", "no object with a step"),
        (b'{"step": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"step": 1, "x": "\xff"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"step": ', "not JSON"),
        (b"", "not JSON"),
        (b'{"step": 0}', "step 0 follows step 0"),
        (b'{"step": 1, "x": "y"}', "x of step 1 is not a number"),
        (b'{"step": 1, "x": null}', "x of step 1 is not a number"),
        (b'{"step": 1, "x": true}', "x of step 1 is not a number"),
        (b'{"step": 1, "x": NaN}', "x of step 1 is not finite"),
        (b'{"step": 1, "x": 1e999}', "x of step 1 is not finite"),
        (b'{"step": 1, "x": -1e308}', "x of step 1 is not finite"),
        (b'{"step": 1, "x": ' + b"9" * 400 + b"}", "x of step 1 is not finite"),
    ],
    ids=lambda value: str(value)[:32],
)
def test_a_damaged_line_of_the_metrics_is_named(tmp_path: Path, line: bytes, wrong: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(METRICS[0].encode() + b"\n" + line + b'\n{"step": 2}\n')
    assert refusal(read_metrics, tmp_path).startswith(f"{file}:2: {wrong}")


@pytest.mark.parametrize(
    ("event", "lacking"),
    [
        ({}, "event"),
        ({"event": 3}, "event"),
        ({"event": "refresh", "age": 2}, "shock"),
        ({"event": "refresh", "shock": "x", "age": 2}, "shock"),
        ({"event": "gate", "gates": {}}, "refresh"),
        ({"event": "gate", "refresh": True}, "gates"),
        ({"event": "gate", "refresh": True, "gates": [GATE]}, "gates"),
        ({"event": "gate", "refresh": True, "gates": {"length": 3}}, "gates"),
        ({"event": "gate", "refresh": True, "gates": {"length": {**GATE, "pass": 1}}}, "gates"),
        ({"event": "gate", "refresh": True, "gates": {"length": {**GATE, "value": "3"}}}, "gates"),
        ({"event": "gate", "refresh": True, "gates": {"length": {"pass": True}}}, "gates"),
    ],
)
def test_a_damaged_event_is_named(tmp_path: Path, event: dict[str, Any], lacking: str) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text("".join(json.dumps(e) + "\n" for e in (EVENTS[0], {"step": 1, **event})))
    message = f"{file}:2: an event without a proper {lacking}"
    assert refusal(read_events, tmp_path) == message


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff", b"{}", b"[" * 100_000, b'{"steps": 3, "status": "odd"}'],
    ids=lambda text: str(text)[:12],
)
def test_a_damaged_summary_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "summary.json").write_bytes(text)
    assert refusal(read_summary, tmp_path).startswith(f"{tmp_path / 'summary.json'}: ")


def test_a_file_that_is_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").mkdir()
    assert "summary.json cannot be read: " in refusal(read_summary, tmp_path)


def test_a_line_torn_within_a_character_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(METRICS[0].encode() + b'\n{"step": 1, "\xc3')
    assert read_metrics(tmp_path) == [json.loads(METRICS[0])]


@given(st.integers(0, len("\n".join(METRICS)) - 1), st.binary(max_size=3), st.integers(0, 3))
def test_no_mutation_ends_in_anything_but_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, at: int, patch: bytes, cut: int
) -> None:
    """Bytes replaced, inserted or cut: the lines are read, or one line says what is wrong."""
    run = tmp_path_factory.mktemp("run")
    whole = "\n".join(METRICS).encode()
    mutated = whole[:at] + patch + whole[at + cut :]
    for name, read in (("metrics.jsonl", read_metrics), ("events.jsonl", read_events)):
        (run / name).write_bytes(mutated)
        try:
            read(run)
        except UsageError as error:
            assert "\n" not in str(error)
