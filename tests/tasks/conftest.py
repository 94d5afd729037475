"""Where this system lets programs be kept apart."""

import pytest

from sodfast.errors import UsageError
from sodfast.tasks.sandbox import Limits, require_sandbox


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skips a test where the kernel or the container allows no user namespaces."""
    try:
        require_sandbox(Limits("namespaces", 256 << 20, 8))
    except UsageError as error:
        pytest.skip(f"no sandbox here: {error}")
