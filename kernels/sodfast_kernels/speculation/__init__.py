"""Guesses of the coming tokens, from texts that are there already."""

from .lookup import find_drafts

__all__ = ["find_drafts"]
