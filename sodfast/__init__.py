"""Self on-policy distillation with every teacher schedule; see README.md for the file tree."""

__version__ = "0.1.0"
