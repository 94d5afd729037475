"""Texts to look drafts up in, and a plain search for them."""

from typing import Any

import torch
from sodfast_kernels.speculation.key import LONGEST, SHORTEST
from torch import Tensor


def plain_search(
    tokens: Tensor, length: Tensor, own: Tensor, sources: Tensor, count: int
) -> list[list[int]]:
    """The definition, word for word."""
    texts = [row[:size] for row, size in zip(tokens.tolist(), length.tolist(), strict=True)]
    drafts = []
    for mine, searched in zip(own.tolist(), sources.tolist(), strict=True):
        best: tuple[int, int, int] | None = None
        found: list[int] = []
        for rank, source in enumerate(searched):
            text = texts[source] if source >= 0 else []
            for position in range(1, len(text)):
                most = min(LONGEST, position, len(texts[mine]))
                matching = [
                    size
                    for size in range(1, most + 1)
                    if text[position - size : position] == texts[mine][-size:]
                ]
                size = max(matching, default=0)
                if size >= SHORTEST and (best is None or (size, -rank, position) > best):
                    best, found = (size, -rank, position), text[position : position + count]
        drafts.append(found + [-1] * (count - len(found)))
    return drafts


def texts(seed: int, count: int, columns: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Random texts of few different tokens, and what nobody may read behind them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (count, columns), generator=generator)
    length = torch.randint(0, columns + 1, (count,), generator=generator)
    return tokens.int(), length.int()


def case(seed: int, columns: int = 40, vocabulary: int = 3, sources: int = 5) -> Any:
    generator = torch.Generator().manual_seed(seed + 1000)
    tokens, length = texts(seed, 9, columns, vocabulary)
    own = torch.randint(0, 9, (6,), generator=generator)
    searched = torch.randint(-1, 9, (6, sources), generator=generator).int()
    return tokens, length, own, searched


def long_case() -> Any:
    """Texts of more than a program searches; what matches stands near the end of one."""
    tokens, length, own, sources = case(7, 4500, vocabulary=20, sources=2)
    length[:] = 4500
    tokens[8, -40:-32] = tokens[0, -8:]
    own[0], sources[0, 0], sources[0, 1] = 0, -1, 8
    return tokens, length, own, sources
