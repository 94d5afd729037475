"""The rows of one call of the native engine: which samples they draw, and their next tokens.

The living rows, always the first ones, decode one token at a time. When enough have finished, they
are moved together and waiting samples take the rows behind them, in order. A prompt runs through
the model once for all of its samples that start together.

A sample starts when the cache has room for what all are expected to become (admission.py). When
the pages run out nevertheless, the youngest sample gives its pages back, waits as the next one, and
is drawn again from its prompt. A token depends on its key and not on its company, so the answer is
the same. The oldest never waits, so the batch always ends.

On a GPU a step is one CUDA graph per power-of-two bucket of rows. The host looks at what has
finished every few steps, with the next ones queued already: a row that has ended since then idles,
and tokens behind a stop string are dropped. Rows change their places only while nothing is queued.

Shapes: B rows, T packed prompt tokens, N tokens to be read, H hidden, S steps, V vocabulary.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
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

    status_2B: Tensor  # whether each row is done, and its count of tokens
    event: Any  # what `mark` gave: behind it `status_2B` is there


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
    ) -> None:
        self.model, self.sampling, self.key = model, sampling, key
        self.device = model.device
        self.on_gpu = self.device.type == "cuda"
        self.width = width
        self.most = rows
        rows = self._bucket(rows)
        self.decoder = Decoder(model.network, width)
        self.cache = Cache(self.decoder, rows, width, memory, page, pages)
        self.eos = torch.tensor(model.eos_ids, device=self.device)
        self.waiting = list(draws)[::-1]  # the next one stands last
        self.rows: list[Draw | None] = []  # None: idle
        self.looks: deque[Look] = deque()
        self.steps = self.drawn = self.ended = 0  # tokens drawn, and answers ended, as far as known

        def state(dtype: torch.dtype, *columns: int) -> Tensor:
            return torch.zeros(rows + CPU_ROWS, *columns, dtype=dtype, device=self.device)

        self.token = state(torch.int64)  # the last token drawn; its keys are not cached yet
        self.cached = state(torch.int32)  # positions in the cache
        self.count = state(torch.int64)  # tokens drawn
        self.sample = state(torch.int64)
        self.done = ~state(torch.bool)
        # Idle rows write to the last column, one more than there can be tokens.
        columns = sampling.max_new_tokens + 1
        self.tokens = state(torch.int64, columns)
        self.logprob = state(torch.float32, columns)
        self.entropy = state(torch.float32, columns)
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
                *(self.token, self.cached, self.count, self.sample, self.done),
                *(self.tokens, self.logprob, self.entropy),
            ):
                tensor[target] = tensor[source]
            for mover, hole in zip(movers, holes, strict=True):
                self.rows[hole] = self.rows[mover]
        self.noise_ahead.clear()
        self.done[alive:] = True
        del self.rows[alive:]

    def _bucket(self, rows: int) -> int:
        """How many rows are decoded when `rows` are in use."""
        if self.on_gpu:
            return min(1 << max(0, rows - 1).bit_length(), self.most)
        return rows + self._padding(rows)

    def _padding(self, rows: int) -> int:
        return idle_rows(rows, self.on_gpu)

    def _longest(self) -> int:
        """Positions of the longest sample in the cache, once all that is queued has run."""
        return self.steps + max(draw.start for draw in self.rows if draw is not None)

    # ---------------------------------------------------------------- steps and looks

    def _queue(self) -> bool:
        """Queue steps and a look behind them. False: the living rows are at their caps or there
        are too few pages, and an earlier look shows which of them have ended."""
        steps = STEPS_PER_LOOK[self.device.type]
        if self.looks and self._at_caps():
            return False
        while not self._grow(steps):
            if self.looks:
                return False
            self._give_up_youngest()
        rows = self._bucket(len(self.rows))
        for _ in range(steps):
            if self.graphs is not None:
                state = [self.token, self.cached, self.count, self.done]
                self.graphs.run(rows, lambda: self._step(rows, self.width), state)
            else:
                width = self._longest() + 1
                self._step(rows, min(self.width, width + -width % WIDTH_STEP))
            self.steps += 1
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
        """Let each living row hold what it will have after so many steps more."""
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
        status_2B = torch.stack([self.done[:active].long(), self.count[:active]])
        self.looks.append(Look(status_2B, mark(self.device)))

    def _look(self) -> dict[int, Sample]:
        """The samples that had finished at the first of the looks, by place."""
        look = self.looks.popleft()
        with beside(look.event):
            done, count = look.status_2B.tolist()
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

    def _step(self, rows: int, width: int) -> None:
        """Feed the last token of the first `rows` rows and draw the next one."""
        cached_B, done_B = self.cached[:rows], self.done[:rows]
        attend = self.cache.decoding(cached_B, done_B, width)
        hidden_BH = self.decoder.forward(self.token[:rows], cached_B.long(), attend)
        cached_B += ~done_B
        self._draw(0, rows, self.decoder.logits(hidden_BH), self._noise(rows))

    def _draw(self, first: int, last: int, logits_BV: Tensor, noise_BV: Tensor | None) -> None:
        """Draw a token for each of the rows first … last−1 and write it down."""
        rows = slice(first, last)
        drawn = sample_tokens(
            logits_BV,
            seed=self.key.seed,
            step=self.key.step,
            sample=self.sample[rows],
            position=self.count[rows],
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k,
            noise=noise_BV,
        )
        spare = self.sampling.max_new_tokens
        row_B = torch.arange(first, last, device=self.device)
        column_B = torch.where(self.done[rows], spare, self.count[rows])
        self.tokens[row_B, column_B] = drawn.token
        self.logprob[row_B, column_B] = drawn.logprob
        self.entropy[row_B, column_B] = drawn.entropy
        self.token[rows] = drawn.token
        self.count[rows] += ~self.done[rows]
        ended_B = (drawn.token[:, None] == self.eos).any(1)
        self.done[rows] |= ended_B | (self.count[rows] == spare)

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

    def _noise(self, rows: int) -> Tensor | None:
        if self.on_gpu or self.sampling.temperature == 0:
            return None
        if not self.noise_ahead:
            vocabulary = self.decoder.head.shape[0]
            steps = max(1, NOISE_ELEMENTS // (rows * vocabulary))
            noise_BSV = gumbel_noise(
                seed=self.key.seed,
                step=self.key.step,
                sample=self.sample[:rows, None],
                position=self.count[:rows, None] + torch.arange(steps),
                vocabulary=vocabulary,
            )
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
