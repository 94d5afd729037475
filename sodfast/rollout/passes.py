"""What a call of the native engine runs on the device: the rows' state, and passes that advance it.

A pass feeds the last token of each row, and behind it drafts of the next ones where there are any
(speculation.py); it draws the token that comes after each by that position's own key, and keeps
those up to the first that is not the draft in its place. batch.py says which rows there are.

On a GPU passes of as many rows and drafts have the same shape, so that they can be a CUDA graph:
idle tokens run along. On a CPU a pass that checks drafts has only the tokens that can count: the
last one of each row that is alive, and the drafts that were found. Without drafts the rows of a
batch, a multiple of CPU_ROWS, all run: to leave out the few that idle would cost more.

Shapes: B rows, Q tokens of each in a pass, K = Q − 1 drafts, T tokens of a pass, N tokens to be
read, H hidden, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sodfast_kernels import gumbel_noise, sample_tokens
from torch import Tensor

from sodfast.model.language_model import LanguageModel
from sodfast.rollout.admission import Draw
from sodfast.rollout.cache import Cache, staged
from sodfast.rollout.engine import SampleKey, Sampling
from sodfast.rollout.speculation import Drafts

# A CPU works on tokens in multiples of this, repeating one or adding idle ones where there are not
# as many: a matrix product of fewer rows sums in another order, and what does not fill a vector
# register goes through another exp. Otherwise a sample's bits would depend on how many others there
# are.
CPU_ROWS = 16
# Elements of noise drawn ahead at a time on a CPU, where one large call is cheaper than many.
NOISE_ELEMENTS = 1 << 14
COUNTERS = 6  # of `Passes.passed`


class Passes:
    """The state of R rows, one sample each, and the passes that advance it."""

    def __init__(
        self,
        model: LanguageModel,
        cache: Cache,
        rows: int,
        sampling: Sampling,
        key: SampleKey,
        drafts: Drafts | None,
    ) -> None:
        self.decoder, self.cache, self.drafts = cache.decoder, cache, drafts
        self.sampling, self.key = sampling, key
        self.device = model.device
        self.on_gpu = self.device.type == "cuda"
        self.eos = torch.tensor(model.eos_ids, device=self.device)

        def state(dtype: torch.dtype, *columns: int) -> Tensor:
            return torch.zeros(rows, *columns, dtype=dtype, device=self.device)

        self.token = state(torch.int64)  # the last token drawn; its keys are not cached yet
        self.row_R1 = torch.arange(rows, device=self.device)[:, None]
        self.cached = state(torch.int32)  # positions in the cache
        self.count = state(torch.int64)  # tokens drawn
        self.cap = state(torch.int64) + sampling.max_new_tokens  # tokens that may be drawn
        self.sample = state(torch.int64)
        self.place = state(torch.int64)
        self.done = ~state(torch.bool)
        # What is not kept goes to the last column, one more than there can be tokens.
        columns = sampling.max_new_tokens + 1
        self.tokens = state(torch.int64, columns)
        self.logprob = state(torch.float32, columns)
        self.entropy = state(torch.float32, columns)
        # What the passes brought so far, in the order of `Pace.count`.
        self.passed = torch.zeros(COUNTERS, dtype=torch.int64, device=self.device)
        self.noise_ahead: list[Tensor] = []  # of the coming passes, the next one last
        self.ran = 0  # tokens of the last pass

    # ---------------------------------------------------------------- rows

    def start(self, first: int, draws: Sequence[Draw]) -> None:
        """Give the rows from `first` on to new samples; `prefill` draws their first tokens."""
        rows = slice(first, first + len(draws))
        lengths = [len(draw.ids) for draw in draws]
        self.cached[rows] = self.put(torch.tensor(lengths, dtype=torch.int32))
        self.sample[rows] = self.put(torch.tensor([draw.sample for draw in draws]))
        self.place[rows] = self.put(torch.tensor([draw.place for draw in draws]))
        self.count[rows] = 0
        if self.drafts is not None:
            self.drafts.start(self.place[rows])
        self.noise_ahead.clear()

    def move(self, sources: Sequence[int], targets: Sequence[int], positions: int) -> None:
        """Give all that some rows have, `positions` at most in the cache, to rows that idle."""
        self.cache.move(sources, targets, positions)
        source, target = (self.put(torch.tensor(rows)) for rows in (sources, targets))
        for tensor in (
            *(self.token, self.cached, self.count, self.cap, self.sample, self.place, self.done),
            *(self.tokens, self.logprob, self.entropy),
        ):
            tensor[target] = tensor[source]

    def idle(self, rows: Sequence[int]) -> None:
        """Let rows idle from now on."""
        self.done.index_fill_(0, self.put(torch.tensor(rows, dtype=torch.int64)), True)

    def put(self, tensor: Tensor) -> Tensor:
        """On the device, without waiting for what is queued there."""
        return staged(tensor, self.device).to(self.device, non_blocking=True)

    def status(self, rows: int) -> Tensor:
        """What the host looks at [2·rows + COUNTERS]: which of the first rows are done, how many
        tokens they have, and what the passes brought."""
        return torch.cat([self.done[:rows].long(), self.count[:rows], self.passed])

    # ---------------------------------------------------------------- passes

    def advancing(self) -> list[Tensor]:
        """The tensors that `step` advances. What else it writes it may write twice."""
        state = [self.token, self.cached, self.count, self.done, self.passed]
        return state if self.drafts is None else [*state, self.drafts.length_N]

    def step(self, rows: int, queries: int, width: int) -> None:
        """One pass over the first `rows` rows, each with its last token and up to `queries` − 1
        drafts; `width` bounds the positions after it."""
        cached_B, done_B = self.cached[:rows], self.done[:rows]
        token_BQ, position_BQ, idle_BQ = (
            x[:, None] for x in (self.token[:rows], cached_B.long(), done_B)
        )
        draft_BK, chosen_T = None, None
        if queries > 1:
            assert self.drafts is not None
            ahead_Q = torch.arange(queries, device=self.device)
            draft_BK = self.drafts.find(self.place[:rows], queries - 1)
            token_BQ = torch.cat([token_BQ, draft_BK.clamp(min=0)], 1)
            position_BQ = (position_BQ + ahead_Q).clamp(max=self.decoder.width - 1)
            idle_BQ = idle_BQ | (self.count[:rows, None] + ahead_Q >= self.cap[:rows, None])
            idle_BQ[:, 1:] |= draft_BK < 0
        if not self.on_gpu and (queries > 1 or rows % CPU_ROWS):
            chosen_T = _chosen(idle_BQ)
        self.ran = idle_BQ.numel() if chosen_T is None else len(chosen_T)
        attend = self.cache.decoding(cached_B, idle_BQ, width, chosen_T)
        hidden_TH = self.decoder.forward(
            _take(token_BQ, chosen_T), _take(position_BQ, chosen_T), attend
        )
        logits_TV, noise_TV = self.decoder.logits(hidden_TH), self._noise(rows, queries, chosen_T)
        alive = rows - done_B.sum()
        emitted_B, tested = self._draw(0, rows, logits_TV, noise_TV, draft_BK, chosen_T)
        cached_B += emitted_B
        if draft_BK is None:
            self.passed[:2] += alive  # each living row draws one
        else:
            found = (~idle_BQ[:, 1]).sum()
            self.passed += torch.stack([emitted_B.sum(), alive, alive, found, *tested])

    def prefill(self, pack: Sequence[tuple[Tensor, range]]) -> None:
        """Run prompts, each once, and draw the first token of the rows that share it."""
        prompts = [prompt for prompt, _ in pack]
        lengths = [len(prompt) for prompt in prompts]
        padding = idle_rows(sum(lengths), self.on_gpu)
        token_T = self.put(F.pad(torch.cat(prompts), (0, padding)))
        position_T = F.pad(torch.cat([torch.arange(n) for n in lengths]), (0, padding))
        attend = self.cache.prefilling(lengths, [rows for _, rows in pack])
        hidden_TH = self.decoder.forward(token_T, self.put(position_T), attend)
        last_N = torch.tensor(lengths).cumsum(0) - 1
        owner_N = torch.tensor([number for number, (_, rows) in enumerate(pack) for _ in rows])
        first, last = pack[0][1].start, pack[-1][1].stop
        self.done[first:last] = False
        chosen_N = None if self.on_gpu else _chosen(self.done[first:last])
        wanted_N = self.put(_take(last_N[owner_N], chosen_N))
        self._draw(first, last, self.decoder.logits(hidden_TH[wanted_N]), None, None, chosen_N)

    def _draw(
        self,
        first: int,
        last: int,
        logits_TV: Tensor,
        noise_TV: Tensor | None,
        draft_BK: Tensor | None,
        chosen_T: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Draw the tokens of the rows first … last−1 and write down those that are kept: up to the
        first that is not the draft in its place, that ends the answer or that is at the cap.

        Returns how many there are of each row [B] int64, 0 where it is done; and, of all rows, the
        drafts that were right and those that were looked at, which may be wrong; without drafts
        nothing of those."""
        rows = slice(first, last)
        queries = 1 if draft_BK is None else draft_BK.shape[1] + 1
        position_BQ = self.count[rows, None] + torch.arange(queries, device=self.device)
        drawn = sample_tokens(
            logits_TV,
            seed=self.key.seed,
            step=self.key.step,
            sample=_take(self.sample[rows, None].expand(-1, queries), chosen_T),
            position=_take(position_BQ, chosen_T),
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k,
            noise=noise_TV,
        )
        token_BQ, logprob_BQ, entropy_BQ = (_put_back(x, position_BQ, chosen_T) for x in drawn)
        done_B, ended_BQ = self.done[rows].clone(), (token_BQ[..., None] == self.eos).any(2)
        kept_BQ = ~done_B[:, None]
        tested: tuple[Tensor, ...] = ()
        if draft_BK is not None:
            right_BK = token_BQ[:, :-1] == draft_BK
            holds_BK = right_BK & ~ended_BQ[:, :-1]
            kept_BQ = torch.cat([kept_BQ, holds_BK], 1).cumprod(1).bool()
            kept_BQ &= position_BQ < self.cap[rows, None]
            tested_BK = kept_BQ[:, :-1] & (draft_BK >= 0)
            tested = ((tested_BK & right_BK).sum(), tested_BK.sum())
        row_B1 = self.row_R1[rows]
        column_BQ = position_BQ.where(kept_BQ, self.sampling.max_new_tokens)
        self.tokens[row_B1, column_BQ] = token_BQ
        self.logprob[row_B1, column_BQ] = logprob_BQ
        self.entropy[row_B1, column_BQ] = entropy_BQ
        emitted_B = kept_BQ.sum(1)
        if draft_BK is None:
            self.token[rows] = token_BQ[:, 0]
        else:
            last_B1 = (emitted_B - 1).clamp(min=0)[:, None]
            self.token[rows] = token_BQ.gather(1, last_B1)[:, 0]
        self.count[rows] += emitted_B
        self.done[rows] |= (ended_BQ & kept_BQ).any(1) | (self.count[rows] >= self.cap[rows])
        if self.drafts is not None:
            place_B = self.place[rows].masked_fill(done_B, self.drafts.idle)
            self.drafts.write(place_B, token_BQ, position_BQ, kept_BQ)
        return emitted_B, tested

    def _noise(self, rows: int, queries: int, chosen_T: Tensor | None) -> Tensor | None:
        """The noise of a pass [T, V]; None where the kernel makes its own or needs none."""
        if self.on_gpu or self.sampling.temperature == 0:
            return None
        vocabulary = self.decoder.head.shape[0]
        sample_B1, position_B1 = self.sample[:rows, None], self.count[:rows, None]
        if queries > 1:  # how many of them will be kept is not known: none can be drawn ahead
            self.noise_ahead.clear()
            position_BQ = position_B1 + torch.arange(queries)
            sample_T = _take(sample_B1.expand(-1, queries), chosen_T)
            return self._gumbel(sample_T, _take(position_BQ, chosen_T))
        if not self.noise_ahead:
            passes = max(1, NOISE_ELEMENTS // (rows * vocabulary))
            noise_BSV = self._gumbel(sample_B1, position_B1 + torch.arange(passes))
            self.noise_ahead = list(noise_BSV.unbind(1))[::-1]
        noise_BV = self.noise_ahead.pop()
        return noise_BV if chosen_T is None else noise_BV[chosen_T]

    def _gumbel(self, sample: Tensor, position: Tensor) -> Tensor:
        return gumbel_noise(
            seed=self.key.seed,
            step=self.key.step,
            sample=sample,
            position=position,
            vocabulary=self.decoder.head.shape[0],
        )


def _chosen(idle_BQ: Tensor) -> Tensor | None:
    """Which of the flattened tokens a CPU runs [T] int64: those that are not idle, the last of them
    (an idle one where there is none) repeated up to a multiple of CPU_ROWS. None: all."""
    working_T = (~idle_BQ).flatten().nonzero()[:, 0]
    if len(working_T) == 0:
        working_T = working_T.new_zeros(1)
    elif len(working_T) == idle_BQ.numel() and len(working_T) % CPU_ROWS == 0:
        return None
    return torch.cat([working_T, working_T[-1:].expand(-len(working_T) % CPU_ROWS)])


def _take(tensor: Tensor, chosen_T: Tensor | None) -> Tensor:
    return tensor.flatten() if chosen_T is None else tensor.flatten()[chosen_T]


def _put_back(drawn_T: Tensor, like_BQ: Tensor, chosen_T: Tensor | None) -> Tensor:
    """[B, Q]; 0 where none was drawn, which no draft is compared with and nobody keeps."""
    if chosen_T is None:
        return drawn_T.view_as(like_BQ)
    return drawn_T.new_zeros(like_BQ.numel()).index_copy_(0, chosen_T, drawn_T).view_as(like_BQ)


def idle_rows(rows: int, on_gpu: bool) -> int:
    """Rows that run beside `rows` used ones without a sequence of their own."""
    return 0 if on_gpu else -rows % CPU_ROWS


def state_bytes(rows: int, max_new_tokens: int) -> int:
    """Bytes that the state of so many rows takes, beside the cache."""
    columns = 16 * (max_new_tokens + 1)  # token, log-prob, entropy
    return rows * (columns + 37)
