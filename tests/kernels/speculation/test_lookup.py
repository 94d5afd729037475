"""The look-up of drafts against a plain search; what it refuses."""

from typing import Any

import pytest
import torch
from drafts import case, long_case, plain_search
from sodfast_kernels import find_drafts


@pytest.mark.parametrize("count", [1, 3, 15])
def test_drafts_are_those_of_a_plain_search(count: int) -> None:
    for seed in range(8):
        arguments = case(seed, vocabulary=2 + seed)
        found = find_drafts(*arguments, count)
        assert found.dtype == torch.int32
        assert found.tolist() == plain_search(*arguments, count)


def test_texts_of_one_to_thousands_of_tokens() -> None:
    for columns in (1, 2, 3):
        arguments = case(7, columns, vocabulary=2)
        assert find_drafts(*arguments, 3).tolist() == plain_search(*arguments, 3)
    arguments = long_case()
    assert find_drafts(*arguments, 3).tolist() == plain_search(*arguments, 3)


def test_the_longest_match_wins_then_the_first_source_then_the_latest_position() -> None:
    rows = [[1, 2, 3], [9, 2, 3, 4, 2, 3, 5], [2, 3, 6, 8], [1, 2, 3, 7]]
    tokens = torch.tensor([row + [0] * (8 - len(row)) for row in rows], dtype=torch.int32)
    length = torch.tensor([len(row) for row in rows], dtype=torch.int32)

    def draft(*sources: int) -> list[int]:
        searched = torch.tensor([sources], dtype=torch.int32)
        found = find_drafts(tokens, length, torch.tensor([0]), searched, 2)
        return [token for token in found[0].tolist() if token >= 0]

    assert draft(1, 2, 3) == [7]
    assert draft(1, 2) == [5]
    assert draft(2, 1) == [6, 8]
    assert draft(-1, 0) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 3)}, "tokens must be"),
        ({"length": torch.zeros(3, dtype=torch.int32)}, "length must have"),
        ({"own": torch.zeros(2, dtype=torch.int32)}, "own must be"),
        ({"sources": torch.zeros(2, 65, dtype=torch.int32)}, "sources must have"),
        ({"sources": torch.zeros(4, 2, dtype=torch.int32).t()}, "sources must be contiguous"),
        ({"count": 0}, "count must be"),
        ({"backend": "cuda"}, "backend must be"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "tokens": torch.zeros(2, 3, dtype=torch.int32),
        "length": torch.zeros(2, dtype=torch.int32),
        "own": torch.zeros(2, dtype=torch.int64),
        "sources": torch.zeros(2, 2, dtype=torch.int32),
        "count": 2,
    }
    with pytest.raises(ValueError, match=message):
        find_drafts(**{**arguments, **change})
