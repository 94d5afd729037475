"""A small model's directory, and proof that a plan opens no connection."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from architectures import qwen


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """A directory that holds a config.json and nothing else."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(qwen(2)))
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan opened a connection")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
