"""Several tokens a pass, with the same answers: drafts, and how many of them pay.

A draw is a function of its logits and its key, so a guess of the next tokens can be checked
exactly: a pass runs the last token and K guesses, draws at every position by its own key, and keeps
the draws up to the first that is not what was guessed there. That draw is itself the right token.
Nothing is rejected by chance, and no answer changes; a wrong guess costs its place in the pass.

Guesses are looked up (`find_drafts`) in texts that are there already: the answer of the same sample
when this prompt was last asked, its siblings of this call, the other answers of the last time, and
the row's own text.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from sodfast_kernels import find_drafts
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sodfast.rollout.admission import Draw

Setting = Literal["auto", False, 1, 3, 7, 15]
# Tokens of a row in one pass. Powers of two, so that a few CUDA graphs cover them and 16 rows of a
# CPU's products are filled.
QUERIES = (1, 2, 4, 8, 16)
MOST_QUERIES = QUERIES[-1]
# Tokens of a pass with drafts at most: on a GPU, about as many as cost what one costs; on a CPU, as
# many as its own cache holds activations of.
MOST_TOKENS = {"cuda": 256, "cpu": 1024}
# Tokens of earlier answers that are remembered on the host, at most: 4 bytes each. A prompt's own
# count eight times, for they are Python's integers, and an answer counts for some more, since its
# tensor has a head.
REMEMBERED, ANSWER_OVERHEAD = 1 << 26, 100
# Bytes that the texts of one call may take on the device: one with more of them checks no drafts.
MOST_TEXT_BYTES = 1 << 30
# Texts that a row searches, its own among them.
MOST_SOURCES = 64
# Before a call has asked for drafts, so many rows count as having asked and so many drafts as
# checked, with this share found and right: enough for a few passes to try some.
PRIOR_COUNT, PRIOR_SHARE = 32.0, 0.75
# What the call before of the same kind has found counts for so much of that.
KEPT = 0.75
# Rows that start before the first drafts of a call were checked, at most.
FIRST_ROWS = 64
# A pass with drafts must promise so much more than one without.
LEAST_GAIN = 1.05
# What a pass costs for itself, for each row and for each token, in tokens: before any was timed.
# On a GPU the weights are read once, whatever the number of tokens.
PRIOR_COST = {"cuda": (256.0, 0.0, 1.0), "cpu": (100.0, 1.5, 1.0)}
# The prior's weight beside a pass that is timed, and what share of that is left at the next one.
PRIOR_WEIGHT, MEMORY = 2.0, 0.99


def resolved(setting: Setting, device: str) -> Setting:
    """`auto` is none on a GPU as long as none has measured what drafts cost and bring there; and an
    answer's last bits would then depend on what was asked before, so on whether a run was resumed.
    """
    return False if setting == "auto" and device == "cuda" else setting


class Cost:
    """Seconds of a pass as a sum: its own, those of each row and those of each token.

    Least squares of the relative errors of the passes that were timed, older ones fading; the prior
    keeps what no pass has told apart.
    """

    def __init__(self, device: str) -> None:
        self.prior = np.array(PRIOR_COST[device])
        self.squares, self.sums = np.zeros((3, 3)), np.zeros(3)
        self.weights = self.prior  # until a pass was timed, in tokens

    def observe(self, rows: int, tokens: int, seconds: float) -> None:
        """A pass of so many rows and tokens took so long."""
        parts = self.prior * (1, rows, tokens) / seconds
        self.squares = MEMORY * self.squares + np.outer(parts, parts)
        self.sums = MEMORY * self.sums + parts
        scale = self.sums.sum() / self.squares.sum()  # the prior's unit in seconds
        strength = PRIOR_WEIGHT / scale**2
        factor = np.linalg.solve(self.squares + strength * np.eye(3), self.sums + strength * scale)
        self.weights = self.prior * factor.clip(min=scale / 10)

    def __call__(self, rows: int, tokens: float) -> float:
        return float(self.weights @ (1, rows, tokens))


class Pace:
    """How many tokens a row has in the next pass, and what the passes so far brought.

    A row finds drafts in a share f of the passes that ask for some. `right` of `checked` drafts,
    those up to the first wrong one, were what was drawn. With a share a of right ones, a row with Q
    tokens gets 1 + f·((1 − a^Q) / (1 − a) − 1) of a pass and has 1 + f·(Q − 1) in it.
    """

    def __init__(self, setting: Setting, device: str, cost: Cost | None = None) -> None:
        self.setting, self.device = setting, device
        self.most, self.cost = MOST_TOKENS[device], cost or Cost(device)
        self.right = self.found = PRIOR_SHARE * PRIOR_COUNT
        self.checked = self.asked = PRIOR_COUNT
        self.emitted = self.passes = 0  # tokens, and rows that were alive, summed over the passes
        self.tried = False

    def begin(self) -> None:
        """A call begins: what was counted before fades, so that drafts that once were bad are tried
        again."""
        share, found = self.right / self.checked, self.found / self.asked
        self.right = PRIOR_COUNT * (KEPT * share + (1 - KEPT) * PRIOR_SHARE)
        self.found = PRIOR_COUNT * (KEPT * found + (1 - KEPT) * PRIOR_SHARE)
        self.checked = self.asked = PRIOR_COUNT
        self.emitted = self.passes = 0
        self.tried = False

    def count(
        self, emitted: int, passes: int, asked: int, found: int, right: int, checked: int
    ) -> None:
        self.emitted += emitted
        self.passes += passes
        self.asked += asked
        self.found += found
        self.right += right
        self.checked += checked
        self.tried |= asked > 0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a row that was alive got from a pass, in the mean of this call."""
        return self.emitted / max(1, self.passes)

    def rows(self, wanted: int) -> int:
        """How many rows pay best where `wanted` could be drawn at once. A GPU reads the weights
        once for all rows, so all of them."""
        if self.setting is False or self.device != "cpu":
            return wanted
        if not self.tried:
            wanted = min(wanted, FIRST_ROWS)
        sizes = {q: min(wanted, self.most // q) for q in self._allowed()}
        return sizes[self._best(sizes)]

    def queries(self, rows: int) -> int:
        """How many tokens of each of so many rows pay best, idle rows among them. Where the setting
        is a number: the most up to it with which the pass is no longer than it may be."""
        return self._best({q: rows for q in self._allowed() if q == 1 or q * rows <= self.most})

    def _allowed(self) -> tuple[int, ...]:
        most = MOST_QUERIES if self.setting == "auto" else self.setting + 1
        return tuple(queries for queries in QUERIES if queries <= most)

    def _best(self, sizes: Mapping[int, int]) -> int:
        """Which number of tokens pays best; `sizes`: for each, how many rows there would be."""
        if self.setting != "auto":
            return max(sizes)
        share, found = min(self.right / self.checked, 0.999), self.found / self.asked

        def speed(queries: int) -> float:
            rows = sizes[queries]
            gained = 1 + found * ((1 - share**queries) / (1 - share) - 1)
            tokens = rows * (1 + found * (queries - 1))
            return rows * gained / self.cost(rows, tokens) / (LEAST_GAIN if queries > 1 else 1)

        return max(sizes, key=lambda queries: (speed(queries), -queries))


class Answers:
    """What each prompt was last answered, on the host: the last call's answers with the last
    epoch's. Of each answer, its number in the key of its draw and its tokens.

    No more than REMEMBERED tokens are kept; the answers that go first are those to the prompts that
    were asked least recently.
    """

    def __init__(self) -> None:
        self.last: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        self.tokens = 0  # of all prompts and answers

    def remember(self, draws: Sequence[Draw], responses: Mapping[int, Tensor]) -> None:
        """Take a call's answers, by place, in the stead of earlier ones to the same prompts."""
        found = defaultdict(list)
        for draw in draws:
            found[draw.ids].append((draw.sample, responses[draw.place].int()))
        for ids, answers in found.items():
            self._forget(ids)
            self.last[ids] = answers
            self.tokens += _held(ids, answers)
        while self.tokens > REMEMBERED:
            self._forget(next(iter(self.last)))

    def _forget(self, ids: tuple[int, ...]) -> None:
        if ids in self.last:
            self.tokens -= _held(ids, self.last.pop(ids))


def _held(ids: tuple[int, ...], answers: Sequence[tuple[int, Tensor]]) -> int:
    """What counts against REMEMBERED: a prompt's tokens are Python integers in a tuple."""
    return 8 * len(ids) + sum(len(answer) + ANSWER_OVERHEAD for _, answer in answers)


class Drafts:
    """The texts of one call on the device: those of its samples, one for each place, which grow as
    they are drawn, one that idle rows write to, and the earlier answers to the same prompts."""

    def __init__(
        self, draws: Sequence[Draw], earlier: Answers, max_new_tokens: int, device: torch.device
    ) -> None:
        asked = {draw.ids: earlier.last.get(draw.ids, []) for draw in draws}
        prompts = {ids: torch.tensor(ids, dtype=torch.int32) for ids in asked}
        first = dict.fromkeys(asked, 0)  # the text of its first earlier answer
        texts = [prompts[draw.ids] for draw in draws]
        texts.append(torch.zeros(0, dtype=torch.int32))
        self.idle = len(draws)
        for ids, answers in asked.items():
            first[ids] = len(texts)
            texts += [torch.cat([prompts[ids], answer]) for _, answer in answers]
        # The last column is one more than a text can have: what is not kept is written there.
        longest = max(map(len, texts))
        columns = max(max(map(len, asked)) + max_new_tokens, longest) + 1
        tokens_NC = F.pad(pad_sequence(texts, batch_first=True), (0, columns - longest))
        self.tokens_NC = tokens_NC.to(device)
        self.length_N = torch.tensor([len(text) for text in texts], dtype=torch.int32).to(device)
        self.prompt_N = self.length_N[: self.idle + 1].long()
        self.sources_NS = self._sources(draws, asked, first).to(device)

    def _sources(
        self,
        draws: Sequence[Draw],
        asked: dict[tuple[int, ...], list[tuple[int, Tensor]]],
        first: dict[tuple[int, ...], int],
    ) -> Tensor:
        """The texts that each place searches, the preferred ones first."""
        siblings: dict[tuple[int, ...], list[int]] = defaultdict(list)
        rank = {}  # of each place among its siblings
        for draw in draws:
            rank[draw.place] = len(siblings[draw.ids])
            siblings[draw.ids].append(draw.place)
        last = {
            ids: {number: first[ids] + i for i, (number, _) in enumerate(answers)}
            for ids, answers in asked.items()
        }
        rows = []
        for draw in draws:
            texts, places = last[draw.ids], siblings[draw.ids]
            same = [texts[draw.sample]] if draw.sample in texts else []
            others = [text for text in texts.values() if text not in same]
            beside = places[: rank[draw.place]] + places[rank[draw.place] + 1 :]
            rows.append([*(same + beside + others)[: MOST_SOURCES - 1], draw.place])
        width = max(map(len, rows))
        rows.append([])
        return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32)

    def start(self, place_B: Tensor) -> None:
        """The texts of these places are their prompts alone, also where one starts over."""
        self.length_N[place_B] = self.prompt_N[place_B].int()

    def find(self, place_B: Tensor, count: int) -> Tensor:
        """[B, count] int32, −1 where there is no draft."""
        sources_BS = self.sources_NS[place_B]
        return find_drafts(self.tokens_NC, self.length_N, place_B, sources_BS, count)

    def write(
        self, place_B: Tensor, token_BQ: Tensor, position_BQ: Tensor, kept_BQ: Tensor
    ) -> None:
        """Add the tokens that are kept, at their positions in the answer, to the rows' texts."""
        prompt_B1 = self.prompt_N[place_B][:, None]
        column_BQ = (prompt_B1 + position_BQ).where(kept_BQ, self.tokens_NC.shape[1] - 1)
        self.tokens_NC[place_B[:, None], column_BQ] = token_BQ.int()
        self.length_N[place_B] += kept_BQ.sum(1, dtype=torch.int32)


def count_texts(draws: Sequence[Draw], earlier: Answers) -> int:
    """How many texts the `Drafts` of these have."""
    prompts = {draw.ids for draw in draws}
    return len(draws) + 1 + sum(len(earlier.last.get(ids, ())) for ids in prompts)


def draft_bytes(texts: int, tokens: int) -> int:
    """Bytes of so many texts of up to so many tokens, and of what lies beside them."""
    return 4 * texts * (tokens + 2 + MOST_SOURCES)
