"""Which waiting samples start, and when: as many as the pages hold once all have grown as expected.

Every answer counts as the mean length, estimated as tokens drawn over answers ended (the maximum
likelihood of a geometric length when some are still growing; `EXPECTED_SHARE` of the cap stands for
one answer that ended before), or as its own length where that is more. A wrong estimate costs time
only: see `Batch` for what happens when the pages run out.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

# Share of the cap that an answer is expected to take before any has ended.
EXPECTED_SHARE = 1 / 8


@dataclass(eq=False)
class Draw:
    """A sample that waits or is being drawn. `place`: its number in the caller's list, by which
    samples start; `sample`: its number in the key."""

    place: int
    prompt: Tensor  # [P] int64
    sample: int
    ids: tuple[int, ...]  # those of the prompt
    start: int = 0  # its positions in the cache are this and the batch's steps
    drawn: int = 0  # tokens that it is known to have; those of an attempt given up count
    searched: int = 0  # tokens that were searched for stop strings


def expected_tokens(cap: int, drawn: int, ended: int) -> int:
    """What an answer is expected to take when `ended` ones have and `drawn` tokens were drawn."""
    return min(cap, int((EXPECTED_SHARE * cap + drawn) / (1 + ended)))


def count_fitting(
    sequences: Iterable[tuple[Hashable, int, int]], pages: int, positions: int
) -> int:
    """How many of these, in order, fit into so many pages of so many `positions`. Of each: which
    prompt it has, the tokens of that, and those of its answer; neighbours with the same prompt
    share its full pages."""
    count, before = 0, None
    for prompt, length, answer in sequences:
        shared = length // positions if count and prompt == before else 0
        pages -= -(-(length + answer) // positions) - shared
        if pages < 0:
            break
        count, before = count + 1, prompt
    return count


def prompt_groups(draws: Sequence[Draw], first: int) -> Iterator[tuple[Tensor, range]]:
    """Prompts with the rows of the neighbours that share them, rows counted from `first`."""
    for _, same in groupby(draws, key=lambda draw: draw.ids):
        sharing = list(same)
        yield sharing[0].prompt, range(first, first + len(sharing))
        first += len(sharing)
