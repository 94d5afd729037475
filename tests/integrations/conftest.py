"""TRL counts what it is used for, over the network, but for runs of a continuous integration."""

import pytest


@pytest.fixture(autouse=True)
def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")
