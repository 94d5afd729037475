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
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sodfast_kernels import gumbel_noise, sample_tokens
from torch import Tensor

from sodfast.errors import RunFailed
from sodfast.model.load import LanguageModel
from sodfast.rollout.admission import Draw, count_fitting, expected_tokens, prompt_groups
from sodfast.rollout.cache import Cache, staged
from sodfast.rollout.decoder import Decoder
from sodfast.rollout.engine import Sample, SampleKey, Sampling, stop_length
from sodfast.rollout.graphs import Graphs, beside, mark
from sodfast.rollout.speculation import MOST_QUERIES, QUERIES, Drafts, Pace

# A CPU works on rows in multiples of this, idle ones or padding added: a matrix product of fewer
# rows sums in another order, and what does not fill a vector register goes through another exp.
# Otherwise a sample's bits would depend on how many others there are.
CPU_ROWS = 16
# Attention on a CPU covers the longest sequence rounded up to a multiple of this: what lies behind
# a sequence then changes no bit of it either (with MKL, from a head size of 32 on; smaller ones
# keep their tokens, not all their bits).
WIDTH_STEP = 16
# Decode steps between two looks at what has finished: a look at a GPU waits for it.
STEPS_PER_LOOK = {"cuda": 8, "cpu": 1}
# Looks that are queued before the host waits for the first of them, each behind its steps.
QUEUED_LOOKS = {"cuda": 2, "cpu": 1}
# Waiting samples start when they will be this share of all living rows: a prefill costs about a
# step.
REFILL_SHARE = 1 / 8
# Prompt tokens of one packed forward, which bounds the memory of its activations.
PREFILL_TOKENS = 16_384
# Elements of noise drawn ahead at a time on a CPU, where one large call is cheaper than many.
NOISE_ELEMENTS = 1 << 14


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
        self.model, self.sampling, self.key = model, sampling, key
        self.device = model.device
        self.on_gpu = self.device.type == "cuda"
        self.width = width
        self.most = rows
        self.pace, self.drafts = pace or Pace(False, self.device.type), drafts
        rows = self._bucket(rows)
        # A pass may reach beyond the longest sequence; what it does there is dropped.
        reach = width + MOST_QUERIES * (page is not None and drafts is not None)
        self.decoder = Decoder(model.network, width)
        self.cache = Cache(self.decoder, rows, reach, memory, page, pages)
        self.eos = torch.tensor(model.eos_ids, device=self.device)
        self.waiting = list(draws)[::-1]  # the next one stands last
        self.rows: list[Draw | None] = []  # None: idle
        self.looks: deque[Look] = deque()
        # Positions that a row may have gained since the beginning; tokens drawn, and answers ended,
        # as far as known.
        self.steps = self.drawn = self.ended = 0

        def state(dtype: torch.dtype, *columns: int) -> Tensor:
            return torch.zeros(rows + CPU_ROWS, *columns, dtype=dtype, device=self.device)

        self.token = state(torch.int64)  # the last token drawn; its keys are not cached yet
        self.cached = state(torch.int32)  # positions in the cache
        self.count = state(torch.int64)  # tokens drawn
        self.sample = state(torch.int64)
        self.place = state(torch.int64)
        self.done = ~state(torch.bool)
        # Idle rows write to the last column, one more than there can be tokens.
        columns = sampling.max_new_tokens + 1
        self.tokens = state(torch.int64, columns)
        self.logprob = state(torch.float32, columns)
        self.entropy = state(torch.float32, columns)
        # What the passes brought, as `Pace.count` has it: on the device, and as far as known.
        self.passed = torch.zeros(4, dtype=torch.int64, device=self.device)
        self.counted = [0] * 4
        self.graphs = Graphs() if self.on_gpu else None
        self.noise_ahead: list[Tensor] = []  # of the coming steps, the next one last

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
        queries = self._queries(self.alive)
        return self._bucket(self.alive, queries) < self._bucket(len(self.rows), queries)

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
        following = self.waiting[: alive - self.most - 1 : -1]
        count = len(following)
        if count and not self.cache.whole:
            expected = expected_tokens(self.sampling.max_new_tokens, self.drawn, self.ended)
            free = len(self.cache.free) - sum(
                self.cache.missing(row, len(draw.prompt) + max(expected, draw.drawn))
                for row, draw in enumerate(self.rows)
                if draw is not None
            )
            wanted = [(draw.ids, len(draw.ids), max(expected, draw.drawn)) for draw in following]
            count = max(count_fitting(wanted, free, self.cache.page), not alive)
        enough = min(len(self.waiting), REFILL_SHARE * (alive + count))
        return count if count >= enough else 0

    def _admit(self, draws: Sequence[Draw]) -> None:
        """Put samples into the rows after the living ones and draw the first token of each."""
        first, last = len(self.rows), len(self.rows) + len(draws)
        self.rows += draws
        for draw in draws:
            draw.start = len(draw.prompt) - self.steps
        lengths = [len(draw.prompt) for draw in draws]
        self.cached[first:last] = self._put(torch.tensor(lengths, dtype=torch.int32))
        self.sample[first:last] = self._put(torch.tensor([draw.sample for draw in draws]))
        self.place[first:last] = self._put(torch.tensor([draw.place for draw in draws]))
        if self.drafts is not None:
            self.drafts.start(self.place[first:last])
        self.count[first:last] = 0
        self.noise_ahead.clear()
        groups = list(prompt_groups(draws, first))
        for prompt, rows in groups:
            self.cache.start(rows, len(prompt))
        for pack in _packs(groups):
            self._prefill(pack)

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
        self.done.index_fill_(0, self._put(torch.tensor(rows)), True)

    def _compact(self) -> None:
        """Move the living rows together into the first ones."""
        alive = self.alive
        holes = [row for row in range(alive) if self.rows[row] is None]
        movers = [row for row in range(alive, len(self.rows)) if self.rows[row] is not None]
        if movers:
            source, target = (self._put(torch.tensor(rows)) for rows in (movers, holes))
            self.cache.move(movers, holes, self._longest())
            for tensor in (
                *(self.token, self.cached, self.count, self.sample, self.place, self.done),
                *(self.tokens, self.logprob, self.entropy),
            ):
                tensor[target] = tensor[source]
            for mover, hole in zip(movers, holes, strict=True):
                self.rows[hole] = self.rows[mover]
        self.noise_ahead.clear()
        self.done[alive:] = True
        del self.rows[alive:]

    def _bucket(self, rows: int, queries: int = 1) -> int:
        """How many rows are decoded when `rows` are in use and each has so many tokens."""
        if self.on_gpu:
            return min(1 << max(0, rows - 1).bit_length(), self.most)
        return rows + -rows % max(1, CPU_ROWS // queries)

    def _queries(self, alive: int) -> int:
        """Tokens of each row in the next pass."""
        if self.drafts is None:
            return 1
        return self.pace.queries({q: q * self._bucket(alive, q) for q in QUERIES})

    def _padding(self, rows: int) -> int:
        return idle_rows(rows, self.on_gpu)

    def _longest(self) -> int:
        """Positions of the longest sample in the cache, once all that is queued has run."""
        return self.steps + max(draw.start for draw in self.rows if draw is not None)

    # ---------------------------------------------------------------- steps and looks

    def _queue(self) -> bool:
        """Queue steps and a look behind them. False: the living rows are at their caps or there
        are too few pages, and an earlier look shows which of them have ended."""
        steps, queries = STEPS_PER_LOOK[self.device.type], self._queries(self.alive)
        if self.looks and self._at_caps():
            return False
        while not self._grow(steps * queries):
            if self.looks:
                return False
            self._give_up_youngest()
        rows = self._bucket(len(self.rows), queries)
        for _ in range(steps):
            if self.graphs is not None:
                state = [self.token, self.cached, self.count, self.done, self.passed]
                state += [] if self.drafts is None else [self.drafts.length_N]
                step = partial(self._step, rows, queries, self.width)
                self.graphs.run((rows, queries), step, state)
            else:
                width = self._longest() + queries
                self._step(rows, queries, min(self.width, width + -width % WIDTH_STEP))
            self.steps += queries
        self._add_look()
        return True

    def _most_cached(self, draw: Draw) -> int:
        """Positions at the cap: the last token's keys and values are never cached."""
        return len(draw.prompt) + self.sampling.max_new_tokens - 1

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
        active = len(self.rows)
        status = torch.cat([self.done[:active].long(), self.count[:active], self.passed])
        self.looks.append(Look(status, self.steps, mark(self.device)))

    def _look(self) -> dict[int, Sample]:
        """The samples that had finished at the first of the looks, by place."""
        look = self.looks.popleft()
        with beside(look.event):
            status = look.status.tolist()
            active = len(self.rows)
            done, count, passed = status[:active], status[active:-4], status[-4:]
            for row, draw in enumerate(self.rows):
                if draw is not None:
                    draw.start = len(draw.prompt) + count[row] - 1 - look.steps
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
        tokens_BL = self.tokens[: len(done), : max(count)].cpu() if stop else None
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
                ended.append((row, length, True))
            elif done[row]:
                ended.append((row, count[row], False))
        return ended

    def _samples(self, ended: Sequence[tuple[int, int, bool]]) -> dict[int, Sample]:
        """The samples of rows that have ended, on the CPU, by place."""
        rows = torch.tensor([row for row, *_ in ended], device=self.device)
        longest = max(length for _, length, _ in ended)
        tokens, logprob, entropy = (
            tensor[rows, :longest].cpu() for tensor in (self.tokens, self.logprob, self.entropy)
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

    # ---------------------------------------------------------------- one step

    def _step(self, rows: int, queries: int, width: int) -> None:
        """Feed the last token of the first `rows` rows and so many drafts that there are `queries`;
        draw the next token behind each and keep those that hold."""
        cached_B, done_B = self.cached[:rows], self.done[:rows]
        ahead_Q = torch.arange(queries, device=self.device)
        idle_BQ = self.count[:rows, None] + ahead_Q >= self.sampling.max_new_tokens
        idle_BQ |= done_B[:, None]
        token_BQ, draft_BK = self.token[:rows, None], None
        if queries > 1:
            assert self.drafts is not None
            draft_BK = self.drafts.find(self.place[:rows], queries - 1)
            token_BQ = torch.cat([token_BQ, draft_BK.clamp(min=0)], 1)
        attend = self.cache.decoding(cached_B, idle_BQ, width)
        position_BQ = (cached_B.long()[:, None] + ahead_Q).clamp(max=self.width - 1)
        hidden_TH = self.decoder.forward(token_BQ.flatten(), position_BQ.flatten(), attend)
        logits_TV, noise_TV = self.decoder.logits(hidden_TH), self._noise(rows, queries)
        alive = rows - done_B.sum()
        emitted_B = self._draw(0, rows, logits_TV, noise_TV, draft_BK)
        cached_B += emitted_B
        emitted = emitted_B.sum()
        right, checked = emitted - alive, emitted_B.clamp(max=queries - 1).sum()
        self.passed += torch.stack([emitted, alive, right, checked])

    def _draw(
        self,
        first: int,
        last: int,
        logits_TV: Tensor,
        noise_TV: Tensor | None,
        draft_BK: Tensor | None = None,
    ) -> Tensor:
        """Draw the tokens of the rows first … last−1 and write down those that are kept: up to the
        first that is not the draft in its place, that ends the answer or that is at the cap.
        Returns how many there are of each row [B] int64, 0 where it is done."""
        rows = slice(first, last)
        queries = len(logits_TV) // (last - first)
        ahead_Q = torch.arange(queries, device=self.device)
        position_BQ = self.count[rows, None] + ahead_Q
        drawn = sample_tokens(
            logits_TV,
            seed=self.key.seed,
            step=self.key.step,
            sample=self.sample[rows].repeat_interleave(queries),
            position=position_BQ.flatten(),
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k,
            noise=noise_TV,
        )
        spare, done_B = self.sampling.max_new_tokens, self.done[rows].clone()
        token_BQ, logprob_BQ, entropy_BQ = (x.view(-1, queries) for x in drawn)
        ended_BQ = (token_BQ[..., None] == self.eos).any(2)
        kept_BQ = ~done_B[:, None]
        if draft_BK is not None:
            holds_BK = (token_BQ[:, :-1] == draft_BK) & ~ended_BQ[:, :-1]
            kept_BQ = torch.cat([kept_BQ, holds_BK], 1).cumprod(1).bool() & (position_BQ < spare)
        row_B1 = torch.arange(first, last, device=self.device)[:, None]
        column_BQ = position_BQ.where(kept_BQ, spare)
        self.tokens[row_B1, column_BQ] = token_BQ
        self.logprob[row_B1, column_BQ] = logprob_BQ
        self.entropy[row_B1, column_BQ] = entropy_BQ
        emitted_B = kept_BQ.sum(1)
        last_B1 = (emitted_B - 1).clamp(min=0)[:, None]
        self.token[rows] = token_BQ.gather(1, last_B1)[:, 0]
        self.count[rows] += emitted_B
        self.done[rows] |= (ended_BQ & kept_BQ).any(1) | (self.count[rows] == spare)
        if self.drafts is not None:
            place_B = self.place[rows].masked_fill(done_B, self.drafts.idle)
            self.drafts.write(place_B, token_BQ, position_BQ, kept_BQ)
        return emitted_B

    def _prefill(self, pack: Sequence[tuple[Tensor, range]]) -> None:
        """Run prompts, each once, and draw the first token of the rows that share it."""
        prompts = [prompt for prompt, _ in pack]
        lengths = [len(prompt) for prompt in prompts]
        padding = self._padding(sum(lengths))
        token_T = self._put(F.pad(torch.cat(prompts), (0, padding)))
        position_T = F.pad(torch.cat([torch.arange(n) for n in lengths]), (0, padding))
        attend = self.cache.prefilling(lengths, [rows for _, rows in pack])
        hidden_TH = self.decoder.forward(token_T, self._put(position_T), attend)
        last_N = torch.tensor(lengths).cumsum(0) - 1
        owner_N = torch.tensor([number for number, (_, rows) in enumerate(pack) for _ in rows])
        first, last = pack[0][1].start, pack[-1][1].stop
        self.done[first:last] = False
        padding = self._padding(last - first)  # rows that idle
        wanted_N = self._put(F.pad(last_N[owner_N], (0, padding)))
        self._draw(first, last + padding, self.decoder.logits(hidden_TH[wanted_N]), None)

    def _noise(self, rows: int, queries: int) -> Tensor | None:
        if self.on_gpu or self.sampling.temperature == 0:
            return None
        if queries > 1:  # how many of them will be kept is not known: none can be drawn ahead
            self.noise_ahead.clear()
        if not self.noise_ahead:
            vocabulary = self.decoder.head.shape[0]
            steps = queries
            if queries == 1:
                steps = max(1, NOISE_ELEMENTS // (rows * vocabulary))
            noise_BSV = gumbel_noise(
                seed=self.key.seed,
                step=self.key.step,
                sample=self.sample[:rows, None],
                position=self.count[:rows, None] + torch.arange(steps),
                vocabulary=vocabulary,
            )
            if queries > 1:
                return noise_BSV.flatten(0, 1)
            self.noise_ahead = list(noise_BSV.unbind(1))[::-1]
        return self.noise_ahead.pop()

    def _put(self, tensor: Tensor) -> Tensor:
        """On the device, without waiting for what is queued there."""
        return staged(tensor, self.device).to(self.device, non_blocking=True)


def _packs(groups: Iterable[tuple[Tensor, range]]) -> Iterator[list[tuple[Tensor, range]]]:
    """Lists of prompts, each within PREFILL_TOKENS, unless a single prompt exceeds it."""
    pack: list[tuple[Tensor, range]] = []
    tokens = 0
    for prompt, rows in groups:
        if pack and tokens + len(prompt) > PREFILL_TOKENS:
            yield pack
            pack, tokens = [], 0
        pack.append((prompt, rows))
        tokens += len(prompt)
    yield pack


def idle_rows(rows: int, on_gpu: bool) -> int:
    """Rows that run beside `rows` used ones without a sequence of their own."""
    return 0 if on_gpu else -rows % CPU_ROWS


def state_bytes(rows: int, max_new_tokens: int) -> int:
    """Bytes that a batch of so many rows holds beside the cache."""
    columns = 16 * (max_new_tokens + 1)  # token, log-prob, entropy
    return (rows + CPU_ROWS) * (columns + 29)
