"""Who starts: the expected length of an answer, and how many samples some pages hold."""

import pytest
import torch

from sodfast.rollout.admission import Draw, count_fitting, expected_tokens, prompt_groups


def test_answers_are_expected_to_take_an_eighth_of_the_cap_until_some_have_ended() -> None:
    assert expected_tokens(8192, 0, 0) == 1024
    assert expected_tokens(8192, 64 * 50, 0) == 1024 + 64 * 50  # none of them has ended so far
    assert expected_tokens(8192, 64 * 500, 0) == 8192
    assert expected_tokens(8192, 1500 * 99, 99) == pytest.approx(1500, abs=6)


def test_an_estimate_over_geometric_lengths_of_which_most_still_grow_is_their_mean() -> None:
    """The mean of those that have ended would be far too short."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(4000).geometric_(1 / 300, generator=generator).clamp_min(1)
    so_far = lengths.clamp_max(100)
    ended = lengths[lengths <= 100]
    assert len(ended) < 1400 and ended.mean() < 60
    found = expected_tokens(100_000, int(so_far.sum()), len(ended))
    assert found == pytest.approx(300, rel=0.06)


def test_pages_are_counted_with_the_prompts_full_ones_shared() -> None:
    """Of 16 positions: a prompt of 40 has 2 full pages, and with 20 tokens more takes 4 in all."""
    same = [("a", 40, 20)] * 5
    for pages, count in ((3, 0), (4, 1), (5, 1), (6, 2), (11, 4), (12, 5), (99, 5)):
        assert count_fitting(same, pages, 16) == count
    different = [(name, 40, 20) for name in "abc"]
    assert [count_fitting(different, pages, 16) for pages in (3, 4, 7, 8, 12)] == [0, 1, 1, 2, 3]
    # In order: what does not fit keeps those behind it waiting.
    assert count_fitting([("a", 40, 20), ("b", 400, 20), ("c", 1, 1)], 10, 16) == 1
    assert count_fitting([(None, 40, 20)], 2, 16) == 0


def test_neighbours_with_equal_prompts_share_a_prefill() -> None:
    prompts = [(3, 4), (3, 4), (5,), (3, 4)]
    draws = [Draw(i, torch.tensor(ids), i, ids) for i, ids in enumerate(prompts)]
    found = [(prompt.tolist(), rows) for prompt, rows in prompt_groups(draws, 7)]
    assert found == [([3, 4], range(7, 9)), ([5], range(9, 10)), ([3, 4], range(10, 11))]
