"""Student → samples by our own engine: pages, one packed prefill per prompt, refill, no copy.

The engine reads the weights of the live student at every call, and its cache lives for one call:
nothing can be stale after an update, and training has the memory back. cache.py has the keys and
values, batch.py the rows that are drawn at once; this file sizes both.

A token is a function of the weights, its prompt and its key (seed, step, sample, position). On a
CPU it is the same bit for bit whatever else is in the batch. On a GPU a call that is repeated gives
the same bits; other company changes the shapes of products and so their rounding, and with it what
is drawn where two tokens are within that.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from sodfast.errors import UsageError
from sodfast.model.language_model import LanguageModel
from sodfast.rollout.admission import Draw, count_fitting, expected_tokens
from sodfast.rollout.batch import Batch
from sodfast.rollout.cache import PAGE, Cache, up_to_step
from sodfast.rollout.engine import Sample, SampleKey, Sampling, check_prompts
from sodfast.rollout.graphs import current
from sodfast.rollout.passes import CPU_ROWS, idle_rows
from sodfast.rollout.speculation import (
    MOST_TEXT_BYTES,
    Answers,
    Cost,
    Drafts,
    Pace,
    Setting,
    count_texts,
    draft_bytes,
    resolved,
)

# Share of the free memory that the cache may take; the rest is for logits and activations.
MEMORY_SHARE = {"cuda": 0.85, "cpu": 0.5}
# On a CPU the bits of smaller heads depend on how wide a pass is (`WIDTH_STEP`), and so on drafts;
# and those of hidden sizes that are no multiple of this on how products are shared among threads.
EXACT_HEAD, EXACT_HIDDEN = 32, 16


class NativeEngine:
    """Implements `Engine` for the architectures of `sodfast.rollout.decoder`.

    `max_rows`: sequences decoded at once at most. `cache_gib`: budget of the key-value cache; None:
    a share of what is free when a call begins. A short budget means fewer sequences at once and
    more time, never a shorter answer. `speculate`: how many drafts of the next tokens a pass
    checks (speculation.py); no answer depends on it.
    """

    name = "native"

    def __init__(
        self,
        model: LanguageModel,
        max_rows: int,
        cache_gib: float | None = None,
        speculate: Setting = False,
    ) -> None:
        self.model = model
        device = model.device.type
        exact = device != "cpu" or (
            model.network.model.layers[0].self_attn.head_dim >= EXACT_HEAD
            and model.network.config.hidden_size % EXACT_HIDDEN == 0
        )
        self.setting: Setting = resolved(speculate, device) if exact else False
        # Calls with the same seed are of a kind, such as evaluations: in one as many drafts hold
        # as in the one before.
        self.cost, self.paces = Cost(device), dict[int, Pace]()
        self.pace = Pace(False, device)
        self.answers = Answers()
        self.max_rows = max_rows
        self.cache_gib = cache_gib
        self.memory: Tensor | None = None

    def require(self, tokens: int) -> None:
        """See `Engine.require`."""
        self.size(tokens, self.max_rows)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Tensor],
        samples: Sequence[int],
        sampling: Sampling,
        key: SampleKey,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Sample]:
        """See `Engine.generate`. Raises `UsageError` when not even one sequence fits."""
        check_prompts(prompts, sampling)
        tokens = max(len(prompt) for prompt in prompts) + sampling.max_new_tokens
        size = self.size(tokens, len(prompts))
        draws = [
            Draw(place, prompt, sample, tuple(prompt.tolist()))
            for place, (prompt, sample) in enumerate(zip(prompts, samples, strict=True))
        ]
        device, drafts = self.model.device, None
        self.pace = Pace(False, device.type)
        texts = count_texts(draws, self.answers)
        if self.speculates and draft_bytes(texts, tokens) <= MOST_TEXT_BYTES:
            drafts = Drafts(draws, self.answers, sampling.max_new_tokens, device)
            self.pace = self.paces.setdefault(key.seed, Pace(self.setting, device.type, self.cost))
            self.pace.begin()
        finished: dict[int, Sample] = {}
        with current(device):
            batch = Batch(
                self.model, draws, size.rows, up_to_step(tokens), sampling, key,
                self.memory, size.page, size.pages, self.pace, drafts,
            )  # fmt: skip
            if device.type == "cpu":
                # A CPU's cache is small, and mapping it anew would take a fifth of a lab's rollout.
                self.memory = batch.cache.memory
            while len(finished) < len(prompts):
                done = batch.advance()
                if done:
                    finished |= done
                    progress(len(finished), len(prompts))
        if self.speculates:
            responses = {place: sample.response for place, sample in finished.items()}
            self.answers.remember(draws, responses)
        return [finished[index] for index in range(len(prompts))]

    @property
    def tokens_per_pass(self) -> float | None:
        """See `Engine.tokens_per_pass`. The first token of each answer, which the prompt's pass
        brings, is left out."""
        return self.pace.tokens_per_pass

    @property
    def speculates(self) -> bool:
        """Whether passes check drafts. Not on a CPU with smaller heads than `EXACT_HEAD` or a
        hidden size that `EXACT_HIDDEN` does not divide."""
        return self.setting is not False

    def size(self, tokens: int, sequences: int) -> "CacheSize":
        """The cache of a call with so many sequences of so many tokens, prompt and answer, at most.

        Raises `UsageError` when not even one fits.
        """
        device, rows = self.model.device, min(self.max_rows, sequences)
        free, on_gpu = _free_bytes(device), device.type == "cuda"
        try:
            return cache_size(self.model.network, tokens, rows, self.cache_gib, free, on_gpu)
        except UsageError as error:
            raise UsageError(
                f"{error}: lower rollout.max_new_tokens or rollout.max_prompt_tokens, or raise "
                "rollout.cache_gib"
            ) from error


@dataclass(frozen=True)
class CacheSize:
    """The cache of one call. `rows`: sequences at once, at most; `page`: positions of a page, None
    where it is a whole sequence; `pages`: all there are; `bytes`: of all of them."""

    rows: int
    page: int | None
    pages: int
    bytes: int

    def at_once(self, prompt: int, copies: int, max_new_tokens: int) -> int:
        """How many sequences start together when all prompts have `prompt` tokens and `copies`
        samples each: as many as would fit if every answer took what is expected at the start."""
        if self.page is None:
            return self.rows
        answer = expected_tokens(max_new_tokens, 0, 0)
        numbers = chain.from_iterable(repeat(number, copies) for number in range(self.rows))
        wanted = ((number, prompt, answer) for number in numbers)
        return max(1, min(self.rows, count_fitting(wanted, self.pages - 1, self.page)))


def cache_size(
    network: Any, tokens: int, rows: int, cache_gib: float | None, free: float, on_gpu: bool
) -> CacheSize:
    """The cache for at most so many rows of sequences of so many tokens, prompt and answer. Its
    budget is `cache_gib`, or a share of the `free` bytes where that is None. On a CPU it has a
    multiple of CPU_ROWS rows. The engine and `sodfast plan` both ask here.

    Raises `UsageError` when not even the fewest rows fit.
    """
    kind = "cuda" if on_gpu else "cpu"
    budget = max(0, int(free * MEMORY_SHARE[kind] if cache_gib is None else cache_gib * 2**30))
    page = PAGE[kind]
    positions = up_to_step(tokens) if page is None else page
    each = positions * Cache.bytes_per_token(network)
    longest = -(-tokens // positions)  # pages of the longest sequence
    # Small pages: one more than the sequences', where idle rows write.
    fewest, spare = (CPU_ROWS, 0) if page is None else (1, 1)
    least = (fewest * longest + spare) * each
    if least > budget:
        raise UsageError(
            f"rollout: the keys and values of {fewest} sequence{'s' * (fewest > 1)} of {tokens} "
            f"tokens, the least at a time, take {least / 2**30:.2f} GiB and the cache may have "
            f"{budget / 2**30:.2f} GiB"
        )
    pages = budget // each
    if page is None:
        rows = min(rows, pages // CPU_ROWS * CPU_ROWS)
        pages = rows + idle_rows(rows, on_gpu)
    else:
        pages = min(pages, rows * longest + spare)
        rows = min(rows, pages - spare)
    return CacheSize(rows, page, pages, pages * each)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        # The cache may take what the allocator keeps for reuse; a limit may be less than the card.
        free, total = torch.cuda.mem_get_info(device)
        limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        mine = torch.cuda.memory_reserved(device)
        return min(free + mine, limit) - torch.cuda.memory_allocated(device)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
