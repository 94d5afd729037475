"""What lies between the matrix products of a decoder layer, each a single kernel on a GPU."""

from .rope import rope_and_cache
from .silu import silu_and_mul

__all__ = ["rope_and_cache", "silu_and_mul"]
