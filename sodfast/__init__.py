"""Self on-policy distillation with every teacher schedule; see README.md for the file tree."""


def __getattr__(name: str) -> str:
    """`__version__`: that of the installed distribution, read when somebody asks for it."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("sodfast")
