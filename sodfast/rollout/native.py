"""Student → samples by our own engine: slots, one packed prefill per prompt, refill, no copy.

Each sequence owns a slot of the key-value cache. All active slots, always the first ones, decode
one token at a time; when enough have finished, the waiting samples take their place, in order. A
prompt runs through the model once for all of its samples that start together. The engine reads
the weights of the live student at every call, and its cache lives for one call: nothing can be
stale after an update, and training has the memory back.

A token is a function of the weights, its prompt and its key (seed, step, sample, position). What
else is in the batch changes nothing: bit for bit on a CPU, and on a GPU within one batch bucket.

On a GPU a decode step is one CUDA graph per power-of-two bucket of rows, and the host looks at
what has finished only every few steps. The CPU runs the same functions without a graph.

Shapes: B rows, T packed prompt tokens, R rows that draw their first token, H hidden, S steps,
V vocabulary.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from sodfast_kernels import gumbel_noise, sample_tokens
from torch import Tensor

from sodfast.errors import RunFailed, UsageError
from sodfast.model.load import LanguageModel
from sodfast.rollout.cache import Cache
from sodfast.rollout.decoder import Decoder
from sodfast.rollout.engine import Sample, SampleKey, Sampling, check_prompts, stop_length

# A CPU works on rows in multiples of this, idle ones or padding added: a matrix product of fewer
# rows sums in another order, and what does not fill a vector register goes through another exp.
# Otherwise a sample's bits would depend on how many others there are.
CPU_ROWS = 16
# A slot has a multiple of this many positions, and attention on a CPU covers the longest sequence
# rounded up to such a multiple: what lies behind a sequence then changes no bit of it either
# (with MKL, from a head size of 32 on; smaller ones keep their tokens, not all their bits).
WIDTH_STEP = 16
# Decode steps after which the host looks at what a GPU has finished: each look waits for the GPU.
GPU_STEPS_PER_LOOK = 8
# Free slots are refilled once this share of all slots is free: a prefill costs about a step.
REFILL_SHARE = 1 / 8
# Prompt tokens of one packed forward, which bounds the memory of its activations.
PREFILL_TOKENS = 16_384
# Share of the free memory that the cache may take; the rest is for logits and activations.
MEMORY_SHARE = {"cuda": 0.85, "cpu": 0.5}
# Elements of noise drawn ahead at a time on a CPU, where one large call is cheaper than many.
NOISE_ELEMENTS = 1 << 14


class NativeEngine:
    """Implements `Engine` for the architectures of `sodfast.rollout.decoder`.

    `max_slots`: sequences decoded at once at most. `cache_gib`: budget of the key-value cache;
    None: a share of what is free when a call begins. A short budget means fewer slots and more
    time, never a shorter answer.
    """

    name = "native"

    def __init__(
        self, model: LanguageModel, max_slots: int, cache_gib: float | None = None
    ) -> None:
        self.model = model
        self.max_slots = max_slots
        self.cache_gib = cache_gib
        self.memory: Tensor | None = None

    def require(self, tokens: int) -> None:
        """See `Engine.require`."""
        self.slots(tokens)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Tensor],
        samples: Sequence[int],
        sampling: Sampling,
        key: SampleKey,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Sample]:
        """See `Engine.generate`. Raises `UsageError` when not even one slot fits."""
        check_prompts(prompts, sampling)
        tokens = max(len(prompt) for prompt in prompts) + sampling.max_new_tokens
        slots, width = min(self.slots(tokens), len(prompts)), _width(tokens)
        batch = _Batch(self.model, slots, width, sampling, key, self.memory)
        if self.model.device.type == "cpu":
            # A CPU's cache is small, and mapping it anew would take a fifth of a lab's rollout.
            self.memory = batch.cache.memory
        waiting = list(range(len(prompts)))[::-1]  # the next one stands last
        finished: dict[int, Sample] = {}
        while len(finished) < len(prompts):
            free = slots - batch.alive
            if waiting and (free == slots or free >= slots * REFILL_SHARE):
                taken = [waiting.pop() for _ in range(min(free, len(waiting)))]
                batch.admit(taken, [prompts[i] for i in taken], [samples[i] for i in taken])
            else:
                batch.decode()
            done = batch.harvest()
            if done:
                finished |= done
                progress(len(finished), len(prompts))
        return [finished[index] for index in range(len(prompts))]

    def slots(self, tokens: int) -> int:
        """How many sequences of so many tokens, prompt and answer, the cache can hold at once.

        Raises `UsageError` when that is none.
        """
        device = self.model.device
        free, on_gpu = _free_bytes(device), device.type == "cuda"
        try:
            slots = cache_slots(self.model.network, tokens, self.cache_gib, free, on_gpu)
        except UsageError as error:
            raise UsageError(
                f"{error}: lower rollout.max_new_tokens or rollout.max_prompt_tokens, or raise "
                "rollout.cache_gib"
            ) from error
        return min(self.max_slots, slots)


class _Batch:
    """The slots of one call. Rows 0 … active−1 hold a sequence or idle after one has finished:
    an idle row writes its tokens to a spare column, its keys and values to its own slot."""

    def __init__(
        self,
        model: LanguageModel,
        slots: int,
        width: int,
        sampling: Sampling,
        key: SampleKey,
        memory: Tensor | None,
    ) -> None:
        self.model, self.sampling, self.key = model, sampling, key
        self.device = model.device
        self.on_gpu = self.device.type == "cuda"
        self.width = width
        self.slots = slots
        rows = self._bucket(slots)
        self.decoder = Decoder(model.network, width)
        self.cache = Cache(self.decoder, rows, width, memory)
        self.eos = torch.tensor(model.eos_ids, device=self.device)
        # Of each active row: its place in the caller's list (None: idle), its prompt, and how
        # many of its tokens have been searched for stop strings.
        self.places: list[int | None] = []
        self.prompts: list[Tensor] = []
        self.searched: list[int] = []

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
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.noise_ahead: list[Tensor] = []  # of the coming steps, the next one last

    @property
    def alive(self) -> int:
        return sum(place is not None for place in self.places)

    def admit(
        self, places: Sequence[int], prompts: Sequence[Tensor], samples: Sequence[int]
    ) -> None:
        """Put samples into the rows after the living ones and draw the first token of each."""
        self._compact()
        first, last = len(self.places), len(self.places) + len(places)
        self.places += places
        self.prompts += prompts
        self.searched += [0] * len(places)
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
        self.cached[first:last] = lengths.to(self.device)
        self.sample[first:last] = torch.tensor(samples).to(self.device)
        self.count[first:last] = 0
        self.noise_ahead.clear()
        for groups in _packs(prompts, first):
            self._prefill(groups)

    def decode(self) -> None:
        """One token for every living row; on a GPU as many as lie between two looks."""
        rows = self._bucket(len(self.places))
        if not self.on_gpu:
            longest = int(self.cached[:rows][~self.done[:rows]].max()) + 1
            self._step(rows, longest + -longest % WIDTH_STEP)
            return
        if rows not in self.graphs:
            self.graphs[rows] = self._capture(rows)
        for _ in range(GPU_STEPS_PER_LOOK):
            self.graphs[rows].replay()

    def harvest(self) -> dict[int, Sample]:
        """The samples that have finished since the last call, by place.

        Raises `RunFailed` when the logits of one were not finite.
        """
        active = len(self.places)
        done, count = torch.stack([self.done[:active].long(), self.count[:active]]).tolist()
        ended: list[tuple[int, int, int, bool]] = []  # row, place, tokens, by a stop string
        for row, place in enumerate(self.places):
            if place is not None:
                length = self._stopped(row, count[row])
                if length is not None:
                    ended.append((row, place, length, True))
                elif done[row]:
                    ended.append((row, place, count[row], False))
        finished = self._samples(ended) if ended else {}
        if self._bucket(self.alive) < self._bucket(active):
            self._compact()
        return finished

    # ---------------------------------------------------------------- one step

    def _step(self, rows: int, width: int) -> None:
        """Feed the last token of the first `rows` rows and draw the next one."""
        attend = self.cache.decoding(self.cached[:rows], width)
        hidden_BH = self.decoder.forward(self.token[:rows], self.cached[:rows].long(), attend)
        self.cached[:rows] += ~self.done[:rows]
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

    def _prefill(self, groups: Sequence[tuple[Tensor, range]]) -> None:
        """Run prompts, each once, and draw the first token of the rows that share it."""
        prompts = [prompt for prompt, _ in groups]
        lengths = [len(prompt) for prompt in prompts]
        padding = self._padding(sum(lengths))
        token_T = F.pad(torch.cat(prompts), (0, padding)).to(self.device)
        position_T = F.pad(torch.cat([torch.arange(n) for n in lengths]), (0, padding))
        position_T = position_T.to(self.device)
        attend = self.cache.prefilling(lengths, [rows for _, rows in groups])
        hidden_TH = self.decoder.forward(token_T, position_T, attend)
        last_R = torch.tensor(lengths).cumsum(0) - 1
        owner_R = torch.tensor([number for number, (_, rows) in enumerate(groups) for _ in rows])
        first, last = groups[0][1].start, groups[-1][1].stop
        self.done[first:last] = False
        padding = self._padding(last - first)  # rows that idle
        wanted_R = F.pad(last_R[owner_R], (0, padding)).to(self.device)
        self._draw(first, last + padding, self.decoder.logits(hidden_TH[wanted_R]), None)

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

    def _capture(self, rows: int) -> torch.cuda.CUDAGraph:
        """A CUDA graph of one step of the first `rows` rows. The step that warms up is undone."""
        state = [self.token, self.cached, self.count, self.done]
        before = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(rows, self.width)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(rows, self.width)
        return graph

    # ---------------------------------------------------------------- rows

    def _bucket(self, rows: int) -> int:
        """How many rows are decoded when `rows` are in use."""
        if self.on_gpu:
            return min(1 << max(0, rows - 1).bit_length(), self.slots)
        return rows + self._padding(rows)

    def _padding(self, rows: int) -> int:
        return idle_rows(rows, self.on_gpu)

    def _compact(self) -> None:
        """Move the living rows together into the first ones."""
        alive = self.alive
        holes = [row for row in range(alive) if self.places[row] is None]
        movers = [row for row in range(alive, len(self.places)) if self.places[row] is not None]
        if movers:
            source, target = (torch.tensor(rows, device=self.device) for rows in (movers, holes))
            longest = int(self.cached[source].max())
            self.cache.move(source, target, longest)
            for tensor in (
                *(self.token, self.cached, self.count, self.sample, self.done),
                *(self.tokens, self.logprob, self.entropy),
            ):
                tensor[target] = tensor[source]
            for mover, hole in zip(movers, holes, strict=True):
                self.places[hole] = self.places[mover]
                self.prompts[hole] = self.prompts[mover]
                self.searched[hole] = self.searched[mover]
        self.noise_ahead.clear()
        self.done[alive:] = True
        del self.places[alive:], self.prompts[alive:], self.searched[alive:]

    def _stopped(self, row: int, count: int) -> int | None:
        """The length at which a row's text holds a stop string; None while it holds none."""
        stop = self.sampling.stop
        if not stop:
            return None
        searched, self.searched[row] = self.searched[row], count
        return stop_length(self.model, self.tokens[row, :count].cpu(), stop, searched)

    def _samples(self, ended: Sequence[tuple[int, int, int, bool]]) -> dict[int, Sample]:
        """The samples of rows that have ended, on the CPU, by place; the rows idle from now on."""
        rows = torch.tensor([row for row, *_ in ended], device=self.device)
        longest = max(length for *_, length, _ in ended)
        tokens, logprob, entropy = (
            tensor[rows, :longest].cpu() for tensor in (self.tokens, self.logprob, self.entropy)
        )
        self.done[rows] = True
        samples = {}
        for index, (row, place, length, stopped) in enumerate(ended):
            response = tokens[index, :length]
            capped = not stopped and int(response[-1]) not in self.model.eos_ids
            columns = (logprob[index, :length], entropy[index, :length])
            if not math.isfinite(float(columns[1].sum())):
                raise RunFailed("the model's logits are not finite")
            samples[place] = Sample(self.prompts[row], response, *columns, capped)
            self.places[row] = None
        return samples


def _packs(prompts: Sequence[Tensor], first: int) -> Iterator[list[tuple[Tensor, range]]]:
    """Prompts with the rows that share them, rows counted from `first`; each list within
    PREFILL_TOKENS, unless a single prompt exceeds it."""
    pack: list[tuple[Tensor, range]] = []
    tokens = 0
    row = first
    for prompt, same in groupby(prompts, key=lambda prompt: tuple(prompt.tolist())):
        rows = range(row, row + len(list(same)))
        row = rows.stop
        if pack and tokens + len(prompt) > PREFILL_TOKENS:
            yield pack
            pack, tokens = [], 0
        pack.append((torch.tensor(prompt), rows))
        tokens += len(prompt)
    yield pack


def cache_slots(
    network: Any, tokens: int, cache_gib: float | None, free: float, on_gpu: bool
) -> int:
    """How many sequences of so many tokens, prompt and answer, the cache holds at once: on a CPU a
    multiple of CPU_ROWS. Its budget is `cache_gib`, or a share of the `free` bytes where that is
    None. The engine and `sodfast plan` both ask here.

    Raises `UsageError` when not even the fewest fit.
    """
    share = MEMORY_SHARE["cuda" if on_gpu else "cpu"]
    budget = max(0, int(free * share if cache_gib is None else cache_gib * 2**30))
    step = 1 if on_gpu else CPU_ROWS
    least = step * slot_bytes(network, tokens)
    if least > budget:
        raise UsageError(
            f"rollout: the keys and values of {step} sequence{'s' * (step > 1)} of {tokens} "
            f"tokens, the least at a time, take {least / 2**30:.2f} GiB and the cache may have "
            f"{budget / 2**30:.2f} GiB"
        )
    return budget // least * step


def idle_rows(rows: int, on_gpu: bool) -> int:
    """Rows that run beside `rows` used ones without a sequence of their own."""
    return 0 if on_gpu else -rows % CPU_ROWS


def slot_bytes(network: Any, tokens: int) -> int:
    """Bytes of the keys and values of one slot for sequences of so many tokens."""
    return _width(tokens) * Cache.bytes_per_token(network)


def state_bytes(rows: int, max_new_tokens: int) -> int:
    """Bytes that a batch of so many rows holds beside the cache."""
    columns = 16 * (max_new_tokens + 1)  # token, log-prob, entropy
    return (rows + CPU_ROWS) * (columns + 29)


def _width(tokens: int) -> int:
    return tokens + -tokens % WIDTH_STEP


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        # The cache may take what the allocator keeps for reuse; a limit may be less than the card.
        free, total = torch.cuda.mem_get_info(device)
        limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        mine = torch.cuda.memory_reserved(device)
        return min(free + mine, limit) - torch.cuda.memory_allocated(device)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
