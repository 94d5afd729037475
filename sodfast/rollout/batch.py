"""The rows of one call of the native engine: which samples they draw, and their next tokens.

The living rows, always the first ones, decode one token at a time, or several where drafts of them
can be checked (speculation.py). When enough have finished, they are moved together and waiting
samples take the rows behind them, in order. A prompt runs through the model once for all of its
samples that start together.

A sample starts when the cache has room for what all are expected to become (admission.py). When
the pages run out nevertheless, the youngest sample gives its pages back, waits as the next one, and
is drawn again from its prompt. A token depends on its key and not on its company, so the answer is
the same. The oldest never waits, so the batch always ends.

On a GPU a step is one CUDA graph per power-of-two bucket of rows. The host looks at what has
finished every few steps, with the next ones queued already: a row that has ended since then idles,
and tokens behind a stop string are dropped. Rows change their places only while nothing is queued.

Shapes: B rows, Q tokens of each in a pass, K = Q − 1 drafts, T packed tokens, N tokens to be read,
H hidden, S steps, V vocabulary.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sodfast.errors import RunFailed
from sodfast.model.language_model import LanguageModel
from sodfast.rollout.admission import Draw, count_fitting, expected_tokens, prompt_groups
from sodfast.rollout.cache import Cache, up_to_step
from sodfast.rollout.decoder import Decoder
from sodfast.rollout.engine import Sample, SampleKey, Sampling, stop_length
from sodfast.rollout.graphs import Graphs, beside, mark
from sodfast.rollout.passes import COUNTERS, Passes, idle_rows
from sodfast.rollout.speculation import MOST_QUERIES, Drafts, Pace

# Decode steps between two looks at what has finished: a look at a GPU waits for it.
STEPS_PER_LOOK = {"cuda": 8, "cpu": 1}
# Looks that are queued before the host waits for the first of them, each behind its steps.
QUEUED_LOOKS = {"cuda": 2, "cpu": 1}
# Waiting samples start when they will be this share of all living rows: a prefill costs about a
# step. On a CPU, where rows that idle cost next to nothing, they wait for company longer. Where a
# row gets n tokens from a pass, a sample lives for an n-th of the passes, and √n times this share
# is as good a balance between prefills and rows that idle.
REFILL_SHARE = {"cuda": 1 / 8, "cpu": 1 / 4}
# Prompt tokens of one packed forward, which bounds the memory of its activations.
PREFILL_TOKENS = 16_384
Prompt = TypeVar("Prompt", bound=Sized)


class Look(NamedTuple):
    """What the host will look at."""

    status: Tensor  # whether each row is done, its count of tokens, and what `passed` says
    steps: int  # those of the batch in front of it
    event: Any  # what `mark` gave: behind it `status` is there


class Batch:
    """Rows 0 … active−1 hold a sample or idle after one has finished. `rows`: how many there are
    at most; `width`: positions of a sample at most; `page` and `pages` are those of `Cache`."""

    def __init__(
        self,
        model: LanguageModel,
        draws: Sequence[Draw],
        rows: int,
        width: int,
        sampling: Sampling,
        key: SampleKey,
        memory: Tensor | None = None,
        page: int | None = None,
        pages: int = 0,
        pace: Pace | None = None,
        drafts: Drafts | None = None,
    ) -> None:
        self.model, self.sampling = model, sampling
        self.device = model.device
        self.on_gpu = self.device.type == "cuda"
        self.width = width
        self.most = rows
        self.pace = pace or Pace(False, self.device.type)
        self.speculates = drafts is not None
        rows = self._bucket(rows)
        # A pass may reach beyond the longest sequence; what it does there is dropped.
        reach = width + MOST_QUERIES * (page is not None and self.speculates)
        self.cache = Cache(Decoder(model.network, width), rows, reach, memory, page, pages)
        self.passes = Passes(model, self.cache, rows, sampling, key, drafts)
        self.waiting = list(draws)[::-1]  # the next one stands last
        self.rows: list[Draw | None] = []  # None: idle
        self.looks: deque[Look] = deque()
        # Positions that a row may have gained since the beginning; tokens drawn, and answers ended,
        # as far as known.
        self.steps = self.drawn = self.ended = 0
        self.counted = [0] * COUNTERS  # what the passes brought, as far as known
        self.graphs = Graphs() if self.on_gpu else None

    def advance(self) -> dict[int, Sample]:
        """Queue what can be queued and look at the first of it: the samples that have finished
        since the last call, by place.

        Raises `RunFailed` when the logits of one were not finite.
        """
        if not self.looks:
            self._arrange()
        while len(self.looks) < QUEUED_LOOKS[self.device.type] and self._queue():
            pass
        finished = self._look()
        while self.looks and (self._admissible() or self._too_wide()):
            finished |= self._look()
        return finished

    # ---------------------------------------------------------------- who has a row

    @property
    def alive(self) -> int:
        return sum(draw is not None for draw in self.rows)

    def _too_wide(self) -> bool:
        """Whether fewer rows would do."""
        return self._bucket(self.alive) < self._bucket(len(self.rows))

    def _arrange(self) -> None:
        """Move the living rows together where it pays, and let waiting samples start."""
        count = self._admissible()
        if count or self._too_wide():
            self._compact()
        if count:
            self._admit([self.waiting.pop() for _ in range(count)])
            self._add_look()

    def _admissible(self) -> int:
        """How many of the waiting samples start now."""
        alive = self.alive
        room = self.pace.rows(min(self.most, alive + len(self.waiting))) - alive
        following = self.waiting[: -room - 1 : -1] if room > 0 else []
        count = len(following)
        if count and not self.cache.whole:
            expected = expected_tokens(self.sampling.max_new_tokens, self.drawn, self.ended)
            free = len(self.cache.free) - sum(
                self.cache.missing(row, len(draw.ids) + max(expected, draw.drawn))
                for row, draw in enumerate(self.rows)
                if draw is not None
            )
            wanted = [(draw.ids, len(draw.ids), max(expected, draw.drawn)) for draw in following]
            count = max(count_fitting(wanted, free, self.cache.page), not alive)
        share = REFILL_SHARE[self.device.type] * math.sqrt(max(1, self.pace.tokens_per_pass))
        enough = min(len(self.waiting), min(1, share) * (alive + count))
        return count if count >= enough else 0

    def _admit(self, draws: Sequence[Draw]) -> None:
        """Put samples into the rows after the living ones and draw the first token of each."""
        first = len(self.rows)
        self.rows += draws
        for draw in draws:
            draw.start = len(draw.ids) - self.steps
        self.passes.start(first, draws)
        groups = list(prompt_groups(draws, first))
        for prompt, rows in groups:
            self.cache.start(rows, len(prompt))
        for pack in packs(groups):
            self.passes.prefill(pack)

    def _give_up_youngest(self) -> None:
        """The sample that started last waits again, as the next one."""
        youngest = max((draw.place, row) for row, draw in enumerate(self.rows) if draw is not None)
        draw = self.rows[youngest[1]]
        assert draw is not None
        draw.searched = 0
        self.waiting.append(draw)
        self._free([youngest[1]])

    def _free(self, rows: Sequence[int]) -> None:
        """Let rows idle from now on."""
        for row in rows:
            self.rows[row] = None
            self.cache.release(row)
        self.passes.idle(rows)

    def _compact(self) -> None:
        """Move the living rows together into the first ones."""
        alive = self.alive
        holes = [row for row in range(alive) if self.rows[row] is None]
        movers = [row for row in range(alive, len(self.rows)) if self.rows[row] is not None]
        if movers:
            self.passes.move(movers, holes, self._longest())
            for mover, hole in zip(movers, holes, strict=True):
                self.rows[hole] = self.rows[mover]
        self.passes.idle(range(alive, len(self.rows)))
        self.passes.noise_ahead.clear()
        del self.rows[alive:]

    def _bucket(self, rows: int) -> int:
        """How many rows a pass has when `rows` are in use."""
        if self.on_gpu:
            return min(1 << max(0, rows - 1).bit_length(), self.most)
        return rows + idle_rows(rows, self.on_gpu)

    def _queries(self) -> int:
        """Tokens of each row in the next pass."""
        return self.pace.queries(self._bucket(self.alive)) if self.speculates else 1

    def _longest(self) -> int:
        """Positions of the longest sample in the cache, once all that is queued has run."""
        return self.steps + max(draw.start for draw in self.rows if draw is not None)

    # ---------------------------------------------------------------- steps and looks

    def _queue(self) -> bool:
        """Queue steps and a look behind them. False: the living rows are at their caps or there
        are too few pages, and an earlier look shows which of them have ended."""
        steps, queries = STEPS_PER_LOOK[self.device.type], self._queries()
        if self.looks and self._at_caps():
            return False
        while not self._grow(steps * queries):
            if self.looks:
                return False
            self._give_up_youngest()
        rows = self._bucket(len(self.rows))
        for _ in range(steps):
            if self.graphs is not None:
                step = partial(self.passes.step, rows, queries, self.width)
                self.graphs.run((rows, queries), step, self.passes.advancing())
            else:
                width = self._longest() + queries
                start = perf_counter()
                self.passes.step(rows, queries, min(self.width, up_to_step(width)))
                if self.speculates:
                    seconds = perf_counter() - start
                    self.pace.cost.observe(self.alive, self.passes.ran, seconds)
            self.steps += queries
        self._add_look()
        return True

    def _most_cached(self, draw: Draw) -> int:
        """Positions at the cap: the last token's keys and values are never cached."""
        return len(draw.ids) + self.sampling.max_new_tokens - 1

    def _at_caps(self) -> bool:
        """Whether no row would be alive after what is queued."""
        living = (draw for draw in self.rows if draw is not None)
        return all(draw.start + self.steps >= self._most_cached(draw) for draw in living)

    def _grow(self, steps: int) -> bool:
        """Let each living row hold what it will have with so many positions more."""
        if self.cache.whole:
            return True
        positions = {
            row: min(draw.start + self.steps + steps, self._most_cached(draw))
            for row, draw in enumerate(self.rows)
            if draw is not None
        }
        if not self.cache.grow(positions):
            return False
        self.cache.upload()
        return True

    def _add_look(self) -> None:
        self.looks.append(Look(self.passes.status(len(self.rows)), self.steps, mark(self.device)))

    def _look(self) -> dict[int, Sample]:
        """The samples that had finished at the first of the looks, by place."""
        look = self.looks.popleft()
        with beside(look.event):
            status = look.status.tolist()
            active = len(self.rows)
            done, count, passed = status[:active], status[active : 2 * active], status[2 * active :]
            for row, draw in enumerate(self.rows):
                if draw is not None:
                    draw.start = len(draw.ids) + count[row] - 1 - look.steps
            self.pace.count(*(new - old for new, old in zip(passed, self.counted, strict=True)))
            self.counted = passed
            ended = self._ended(done, count)
            finished = self._samples(ended) if ended else {}
        if ended:
            self.ended += len(ended)
            self._free([row for row, *_ in ended])
        return finished

    def _ended(self, done: Sequence[int], count: Sequence[int]) -> list[tuple[int, int, bool]]:
        """Of the rows that have ended: row, tokens, and whether a stop string ended it."""
        stop, ended = self.sampling.stop, []
        tokens_BL = self.passes.tokens[: len(done), : max(count)].cpu() if stop else None
        for row, draw in enumerate(self.rows):
            if draw is None:
                continue
            length = None
            if tokens_BL is not None:
                response = tokens_BL[row, : count[row]]
                length = stop_length(self.model, response, stop, draw.searched)
                draw.searched = count[row]
            self.drawn += max(0, count[row] - draw.drawn)
            draw.drawn = max(count[row], draw.drawn)
            if length is not None:
                self.pace.emitted -= count[row] - length  # drawn behind the stop string
                ended.append((row, length, True))
            elif done[row]:
                ended.append((row, count[row], False))
        return ended

    def _samples(self, ended: Sequence[tuple[int, int, bool]]) -> dict[int, Sample]:
        """The samples of rows that have ended, on the CPU, by place."""
        rows = torch.tensor([row for row, *_ in ended], device=self.device)
        longest = max(length for _, length, _ in ended)
        tokens, logprob, entropy = (
            tensor[rows, :longest].cpu()
            for tensor in (self.passes.tokens, self.passes.logprob, self.passes.entropy)
        )
        samples = {}
        for index, (row, length, stopped) in enumerate(ended):
            response = tokens[index, :length]
            capped = not stopped and int(response[-1]) not in self.model.eos_ids
            columns = (logprob[index, :length], entropy[index, :length])
            if not math.isfinite(float(columns[1].sum())):
                raise RunFailed("the model's logits are not finite")
            draw = self.rows[row]
            assert draw is not None
            samples[draw.place] = Sample(draw.prompt, response, *columns, capped)
        return samples


def packs(groups: Iterable[tuple[Prompt, range]]) -> Iterator[list[tuple[Prompt, range]]]:
    """Lists of prompts and their rows, each within PREFILL_TOKENS, unless a single prompt exceeds
    it. `sodfast plan`, which knows the prompts' lengths alone, asks here too."""
    pack: list[tuple[Prompt, range]] = []
    tokens = 0
    for prompt, rows in groups:
        if pack and tokens + len(prompt) > PREFILL_TOKENS:
            yield pack
            pack, tokens = [], 0
        pack.append((prompt, rows))
        tokens += len(prompt)
    yield pack
