"""Self on-policy distillation with every teacher schedule; see README.md for the file tree.

    run = sodfast.train("lab", steps=20, schedule={"kind": "hard", "every": 5})

What stands in `__all__` is imported when it is first used, so that `import sodfast` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sodfast.api import Run, Trainer, load_run, train
    from sodfast.config import load_config

__all__ = ["Run", "Trainer", "load_config", "load_run", "train"]


def __getattr__(name: str) -> Any:
    """The names above and `__version__`, that of the installed distribution; each is looked up
    when somebody asks for it."""
    if name == "__version__":
        from importlib.metadata import version  # slow to import, and rarely asked for

        return version("sodfast")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "sodfast.config" if name == "load_config" else "sodfast.api"
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
