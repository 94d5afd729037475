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

import torch
from sodfast_kernels import find_drafts
from torch import Tensor

from sodfast.rollout.admission import Draw

Setting = Literal["auto", False, 1, 3, 7, 15]
# Tokens of a row in one pass. Powers of two, so that a few CUDA graphs cover them and 16 rows of a
# CPU's products are filled.
QUERIES = (1, 2, 4, 8, 16)
MOST_QUERIES = QUERIES[-1]
# A pass costs as much as 1 + tokens / RIDGE passes of none: on a GPU the weights are read once
# whatever the number of tokens, on a CPU operators are called as often.
RIDGE = {"cuda": 256, "cpu": 32}
# Tokens of a pass with drafts at most, which bounds the memory of its logits.
MOST_TOKENS = {"cuda": 256, "cpu": 4096}
# Texts that a row searches, its own among them.
MOST_SOURCES = 64
# Drafts that count as checked before any was, half of them as right: the first passes try a few.
PRIOR_CHECKED, PRIOR_RIGHT = 32.0, 16.0


def resolved(setting: Setting, device: str) -> Setting:
    """`auto` is none on a GPU as long as none has measured what drafts cost and bring there; and an
    answer's last bits would then depend on what was asked before, so on whether a run was resumed.
    """
    return False if setting == "auto" and device == "cuda" else setting


class Pace:
    """How many tokens a row has in the next pass, and what the passes so far brought.

    `right` of `checked` drafts were what was drawn; one that was not there counts as wrong. With a
    share a of right ones, Q tokens of a row bring (1 − a^Q) / (1 − a), as many as come before the
    first wrong one, and that one's draw.
    """

    def __init__(self, setting: Setting, device: str) -> None:
        self.setting = setting
        self.ridge, self.most = RIDGE[device], MOST_TOKENS[device]
        self.right, self.checked = PRIOR_RIGHT, PRIOR_CHECKED
        self.emitted = self.passes = 0  # tokens, and rows that were alive, summed over the passes

    def begin(self) -> None:
        """A call begins: what was counted before fades, so that drafts that once were bad are tried
        again."""
        self.right = (self.right + PRIOR_RIGHT) / 2
        self.checked = (self.checked + PRIOR_CHECKED) / 2
        self.emitted = self.passes = 0

    def count(self, emitted: int, passes: int, right: int, checked: int) -> None:
        self.emitted += emitted
        self.passes += passes
        self.right += right
        self.checked += checked

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a row that was alive got from a pass, in the mean of this call."""
        return self.emitted / max(1, self.passes)

    def queries(self, tokens: dict[int, int]) -> int:
        """How many tokens of each row pay best; `tokens`: for each number that is possible, the
        tokens of the whole pass, idle ones among them."""
        possible = [q for q, count in tokens.items() if q == 1 or count <= self.most]
        if self.setting != "auto":
            return max(queries for queries in possible if queries <= self.setting + 1)
        share = min(self.right / self.checked, 0.999)

        def speed(queries: int) -> float:
            return (1 - share**queries) / (1 - share) / (1 + tokens[queries] / self.ridge)

        return max(possible, key=lambda queries: (speed(queries), -queries))


class Answers:
    """What each prompt was last answered, on the host: the last call's answers with the last
    epoch's. `samples` are the numbers of its answers in their key."""

    def __init__(self) -> None:
        self.last: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}

    def remember(self, draws: Sequence[Draw], responses: Mapping[int, Tensor]) -> None:
        """Take a call's answers, by place, in the stead of earlier ones to the same prompts."""
        found = defaultdict(list)
        for draw in draws:
            found[draw.ids].append((draw.sample, responses[draw.place].int()))
        self.last |= found


class Drafts:
    """The texts of one call on the device: those of its samples, one for each place, which grow as
    they are drawn, one that idle rows write to, and the earlier answers to the same prompts."""

    def __init__(
        self, draws: Sequence[Draw], earlier: Answers, max_new_tokens: int, device: torch.device
    ) -> None:
        asked = {draw.ids: earlier.last.get(draw.ids, []) for draw in draws}
        first = dict.fromkeys(asked, 0)  # the text of its first earlier answer
        texts = [draw.prompt.int() for draw in draws]
        texts.append(torch.zeros(0, dtype=torch.int32))
        self.idle = len(draws)
        for ids, answers in asked.items():
            first[ids] = len(texts)
            prompt = torch.tensor(ids, dtype=torch.int32)
            texts += [torch.cat([prompt, answer]) for _, answer in answers]
        # The last column is one more than a text can have: what is not kept is written there.
        columns = max(max(map(len, asked)) + max_new_tokens, max(map(len, texts))) + 1
        tokens_NC = torch.zeros(len(texts), columns, dtype=torch.int32)
        for row, text in zip(tokens_NC, texts, strict=True):
            row[: len(text)] = text
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
        siblings = defaultdict(list)
        for draw in draws:
            siblings[draw.ids].append(draw.place)
        rows = []
        for draw in draws:
            texts = [(number, first[draw.ids] + i) for i, (number, _) in enumerate(asked[draw.ids])]
            same = [text for number, text in texts if number == draw.sample]
            others = [text for number, text in texts if number != draw.sample]
            beside = [place for place in siblings[draw.ids] if place != draw.place]
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


def draft_bytes(texts: int, tokens: int) -> int:
    """Bytes of so many texts of up to so many tokens, and of what lies beside them."""
    return 4 * texts * (tokens + 2 + MOST_SOURCES)
