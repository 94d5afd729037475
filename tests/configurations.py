"""Configurations of the lab by their overrides, and what is said of one that is refused."""

from typing import Any

import pytest

from sodfast.config import Config, load_config
from sodfast.errors import UsageError


def lab(*overrides: str) -> Config:
    return load_config(None, list(overrides))


def value(config: Config, key: str) -> Any:
    result: Any = config
    for part in key.split("."):
        result = getattr(result, part)
    return result


def refusal(*overrides: str, source: str | None = None) -> str:
    """The message of the refusal, which must be one line."""
    with pytest.raises(UsageError) as error:
        load_config(source, list(overrides))
    message = str(error.value)
    assert message and "\n" not in message
    return message
