"""Attention of a few new tokens over a cache of pages."""

from .decode import decode_attention

__all__ = ["decode_attention"]
