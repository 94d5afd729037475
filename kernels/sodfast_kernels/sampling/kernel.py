"""Triton: tokens drawn from rows of logits, with log-prob and entropy. Defined in draw.py.

Without truncation each logit is read once: V·4 bytes a row in fp32, V·2 in 16 bits. A sweep by
programs of CHUNK logits each, so that few rows still occupy the GPU, leaves 20 bytes each of
online sums and best score; a program a row joins them.

With truncation the winner of the first sweep is drawn from everything, so it lies in the nucleus
with a probability of at least top_p. It does if the mass before it (the tokens more probable, or
as probable with a lower index) is below the line; one more read, from the L2 cache, tells. If not,
nor do the tokens after it, and the winner among those before it is next. The result is exactly
the best of the nucleus. It takes 1/top_p rounds on average at most, and O(log V) for a small
top_k. Top-k and top-p together first search for the k-th greatest logit, in about ten reads.

The cuts depend on V alone and there are no atomics: a row's results do not depend on the batch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Configuration, Sweep, on_device, power_of_two, words
from ..softmax import (
    LN2,
    LOG2E,
    MASKED,
    MASKED_BELOW,
    add_tile,
    fast_log2,
    load_tile,
    log_sum,
    no_sums,
    tile_ids,
)

CHUNK = 8192  # logits of a program of the sweep
NO_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def _log1p_negated(x):
    """−log(1 − x) for 0 < x ≤ 1/2, relative error 2e-7: a minimax polynomial of −log(1 − x)/x."""
    series = 1.44109046459198
    series = series * x - 1.6957759857177734
    series = series * x + 1.2576395273208618
    series = series * x - 0.2035256326198578
    series = series * x + 0.2696094810962677
    series = series * x + 0.24280552566051483
    series = series * x + 0.33370059728622437
    series = series * x + 0.49999284744262695
    return (series * x + 1.0) * x


@triton.jit
def _log_wait2(first, sample, position, seed_low, seed_high, step, BLOCK_SIZE: tl.constexpr):
    """log2 E of the tokens `first` … `first` + BLOCK_SIZE − 1, `first` a multiple of 4."""
    low = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    seed = (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low
    group = first // 4 + tl.arange(0, BLOCK_SIZE // 4)
    word0, word1, word2, word3 = tl.philox(seed, group, position, sample, step)
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    word = tl.reshape(words, [BLOCK_SIZE]).to(tl.int32, bitcast=True)
    # u, or 1 − u where the highest bit is set.
    high = word >> 31
    smaller = ((word ^ high).to(tl.float32) + 0.5) * (2.0**-32)
    return fast_log2(tl.where(high < 0, fast_log2(smaller) * -LN2, _log1p_negated(smaller)))


@triton.jit
def _score2(
    z, first, inverse_temperature, sample, position, seed_low, seed_high, step,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """z / T − log E in base 2, of the tokens `first` … `first` + BLOCK_SIZE − 1, `first`
    a multiple of 4."""
    waits = _log_wait2(first, sample, position, seed_low, seed_high, step, BLOCK_SIZE)
    return z * (inverse_temperature * LOG2E) - waits


@triton.jit
def _argmax(best, index):
    """The greatest score and its index, the lowest among equals."""
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, index, NO_INDEX), 0)


@triton.jit
def _tile_scores(
    z, first, inverse_temperature, sample, position, seed_low, seed_high, step,
    GREEDY: tl.constexpr, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The scores of a tile of logits; greedy ones are the logits."""
    if GREEDY:
        return z
    else:
        waits = _log_wait2(first, sample, position, seed_low, seed_high, step, BLOCK_SIZE)
        waits = tl.reshape(waits, [BLOCK_SIZE // COLUMNS, COLUMNS])
        return z * (inverse_temperature * LOG2E) - waits


@triton.jit
def _sweep_tile(
    logits_ptr, start, tile, vocabulary, scale2, sums, best, best_start, inverse_temperature,
    sample, position, seed_low, seed_high, step,
    GREEDY: tl.constexpr, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    z = load_tile(logits_ptr, start + tile, vocabulary, None, LAST)
    sums, _, _ = add_tile(z, sums, scale2)
    score = _tile_scores(
        z, start, inverse_temperature, sample, position, seed_low, seed_high, step, GREEDY,
        BLOCK_SIZE, COLUMNS,
    )  # fmt: skip
    if LAST:
        score = tl.where(start + tile < vocabulary, score, -float("inf"))
    top = tl.max(score, 1)
    better = top > best
    return sums, tl.where(better, top, best), tl.where(better, start, best_start)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step"])
def sweep_kernel(
    logits_ptr, sample_ptr, position_ptr, partial_ptr, index_ptr, logits_row_stride, vocabulary,
    inverse_temperature, seed_low, seed_high, step,
    GREEDY: tl.constexpr, CHUNK: tl.constexpr, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One chunk of one row: peak, Σ 2^(y − peak), Σ 2^(y − peak)(y − peak), best score; its index.

    A lane remembers in which tile it met its best score; which token of that tile it was, one more
    look tells. partial: [B, chunks, 4] fp32, index: [B, chunks] int32.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    logits_ptr += row * logits_row_stride
    scale2 = inverse_temperature * LOG2E
    sample = tl.load(sample_ptr + row).to(tl.int32)
    position = tl.load(position_ptr + row).to(tl.int32)
    tile = tile_ids(BLOCK_SIZE, COLUMNS)
    sums = no_sums(BLOCK_SIZE // COLUMNS)
    first = chunk * CHUNK
    stop = tl.minimum(first + CHUNK, vocabulary)
    whole = first + (stop - first) // BLOCK_SIZE * BLOCK_SIZE
    best = sums[1] - float("inf")
    best_start = tl.zeros([BLOCK_SIZE // COLUMNS], tl.int32) + first
    for start in range(first, whole, BLOCK_SIZE):
        sums, best, best_start = _sweep_tile(
            logits_ptr, start, tile, vocabulary, scale2, sums, best, best_start,
            inverse_temperature, sample, position, seed_low, seed_high, step, GREEDY, BLOCK_SIZE,
            COLUMNS, False,
        )  # fmt: skip
    if whole < stop:
        sums, best, best_start = _sweep_tile(
            logits_ptr, whole, tile, vocabulary, scale2, sums, best, best_start,
            inverse_temperature, sample, position, seed_low, seed_high, step, GREEDY, BLOCK_SIZE,
            COLUMNS, True,
        )  # fmt: skip
    best, start = _argmax(best, best_start)
    z = load_tile(logits_ptr, start + tile, vocabulary, None, True)
    score = _tile_scores(
        z, start, inverse_temperature, sample, position, seed_low, seed_high, step, GREEDY,
        BLOCK_SIZE, COLUMNS,
    )  # fmt: skip
    # In a row with NaN any token will do, but there must be one.
    score = tl.where((start + tile < stop) & (score == score), score, -float("inf"))
    _, index = _argmax(tl.reshape(score, [BLOCK_SIZE]), tl.reshape(start + tile, [BLOCK_SIZE]))

    peak, total, moment = sums
    top = tl.max(peak, 0)
    gap = (peak - top) * scale2
    factor = tl.exp2(gap)
    slot = row * tl.num_programs(1) + chunk
    tl.store(partial_ptr + 4 * slot, top)
    tl.store(partial_ptr + 4 * slot + 1, tl.sum(total * factor, 0))
    tl.store(partial_ptr + 4 * slot + 2, tl.sum(factor * (moment + gap * total), 0))
    tl.store(partial_ptr + 4 * slot + 3, best)
    tl.store(index_ptr + slot, index)


@triton.jit
def _read(logits_ptr, ids, vocabulary):
    return load_tile(logits_ptr, ids, vocabulary, None, True)


@triton.jit
def _before(logits_ptr, token, vocabulary, top, scale2, BLOCK_SIZE: tl.constexpr):
    """Mass relative to the top, and number, of the tokens before this one."""
    lanes = tl.arange(0, BLOCK_SIZE)
    limit = _read(logits_ptr, token, vocabulary)
    mass = tl.zeros([BLOCK_SIZE], tl.float32)
    count = tl.zeros([BLOCK_SIZE], tl.int32)
    for start in range(0, vocabulary, BLOCK_SIZE):
        ids = start + lanes
        z = _read(logits_ptr, ids, vocabulary)
        before = (z > limit) | ((z == limit) & (ids < token))
        mass += tl.where(before, tl.exp2((z - top) * scale2), 0.0)
        count += tl.where(before, 1, 0)
    return tl.sum(mass, 0), tl.sum(count, 0)


@triton.jit
def _best_before(
    logits_ptr, token, vocabulary, inverse_temperature, sample, position, seed_low, seed_high,
    step, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """The winner among the tokens before this one; there must be one."""
    lanes = tl.arange(0, BLOCK_SIZE)
    limit = _read(logits_ptr, token, vocabulary)
    best = tl.zeros([BLOCK_SIZE], tl.float32) - float("inf")
    index = tl.zeros([BLOCK_SIZE], tl.int32)
    for start in range(0, vocabulary, BLOCK_SIZE):
        ids = start + lanes
        z = _read(logits_ptr, ids, vocabulary)
        before = (z > limit) | ((z == limit) & (ids < token))
        if tl.max(tl.where(before, 1, 0), 0) > 0:  # the noise costs more than this test
            score = _score2(
                z, start, inverse_temperature, sample, position, seed_low, seed_high, step,
                BLOCK_SIZE,
            )  # fmt: skip
            better = before & (score > best)
            best = tl.where(better, score, best)
            index = tl.where(better, ids, index)
    _, token = _argmax(best, index)
    return token


@triton.jit
def _top_k_mass(logits_ptr, k, vocabulary, top, scale2, BLOCK_SIZE: tl.constexpr):
    """Mass relative to the top of the k greatest logits.

    The k-th lies in [low, high], both logits of the row. A pivot between them raises one to the
    next logit or lowers the other, so ties end the search, too.
    """
    lanes = tl.arange(0, BLOCK_SIZE)
    low = tl.full([], MASKED, tl.float32)
    high = top
    width = 8.0 / scale2
    while low < high:
        middle = low + 0.5 * (high - low)
        # No logit is known below: reach further down each time.
        pivot = tl.where(low < MASKED_BELOW, high - width, middle)
        pivot = tl.where((pivot > low) & (pivot < high), pivot, high)
        width *= 2
        count = tl.zeros([BLOCK_SIZE], tl.int32)
        above = tl.zeros([BLOCK_SIZE], tl.float32) + float("inf")
        below = tl.zeros([BLOCK_SIZE], tl.float32) + MASKED
        for start in range(0, vocabulary, BLOCK_SIZE):
            ids = start + lanes
            z = _read(logits_ptr, ids, vocabulary)
            reached = z >= pivot
            count += tl.where(reached, 1, 0)
            above = tl.minimum(above, tl.where(reached, z, float("inf")))
            below = tl.maximum(below, tl.where(reached, MASKED, z))
        enough = tl.sum(count, 0) >= k
        low = tl.where(enough, tl.min(above, 0), low)
        high = tl.where(enough, high, tl.max(below, 0))
    mass = tl.zeros([BLOCK_SIZE], tl.float32)
    count = tl.zeros([BLOCK_SIZE], tl.int32)
    for start in range(0, vocabulary, BLOCK_SIZE):
        z = _read(logits_ptr, start + lanes, vocabulary)
        mass += tl.where(z > low, tl.exp2((z - top) * scale2), 0.0)
        count += tl.where(z > low, 1, 0)
    equals = (k - tl.sum(count, 0)).to(tl.float32)
    return tl.sum(mass, 0) + equals * tl.exp2((low - top) * scale2)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step"])
def settle_kernel(
    logits_ptr, sample_ptr, position_ptr, partial_ptr, index_ptr, token_ptr, logprob_ptr,
    entropy_ptr, logits_row_stride, vocabulary, chunks, inverse_temperature, top_p, k,
    seed_low, seed_high, step,
    TOP_P: tl.constexpr, TOP_K: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One row: joins the chunks, and truncates if TOP_P or TOP_K. CHUNKS: a power of two."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_row_stride
    scale2 = inverse_temperature * LOG2E
    slots = tl.arange(0, CHUNKS)
    exists = slots < chunks
    partial_ptr += 4 * (row * chunks + slots)
    peak = tl.load(partial_ptr, mask=exists, other=MASKED)
    total = tl.load(partial_ptr + 1, mask=exists, other=0.0)
    moment = tl.load(partial_ptr + 2, mask=exists, other=0.0)
    best = tl.load(partial_ptr + 3, mask=exists, other=-float("inf"))
    index = tl.load(index_ptr + row * chunks + slots, mask=exists, other=NO_INDEX)
    _, entropy, top, log_mass2 = log_sum((peak, total, moment), scale2)
    _, token = _argmax(best, index)
    if TOP_P or TOP_K:
        sample = tl.load(sample_ptr + row).to(tl.int32)
        position = tl.load(position_ptr + row).to(tl.int32)
        line = float("inf")
        if TOP_P:
            if TOP_K:
                whole = _top_k_mass(logits_ptr, k, vocabulary, top, scale2, BLOCK_SIZE)
            else:
                whole = tl.sum(total * tl.exp2((peak - top) * scale2), 0)
            line = whole * top_p
        mass, count = _before(logits_ptr, token, vocabulary, top, scale2, BLOCK_SIZE)
        while (mass >= line) | (count >= k):
            token = _best_before(
                logits_ptr, token, vocabulary, inverse_temperature, sample, position, seed_low,
                seed_high, step, BLOCK_SIZE,
            )  # fmt: skip
            mass, count = _before(logits_ptr, token, vocabulary, top, scale2, BLOCK_SIZE)
    z = _read(logits_ptr, token, vocabulary)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, ((z - top) * scale2 - log_mass2) * LN2)
    tl.store(entropy_ptr + row, entropy)


# Eight neighbouring logits a thread, so 16-bit ones are read 16 bytes at a time; in programs small
# enough that all those of 64 rows run at once.
SIZES = {"BLOCK_SIZE": 1024, "COLUMNS": 8, "num_warps": 4}


def settle_options(vocabulary: int, truncates: bool) -> dict[str, int]:
    """Only truncation reads the row again, one program alone: with as many threads as it can."""
    if vocabulary <= 1024 or not truncates:
        return {"BLOCK_SIZE": 1024, "num_warps": 4}
    return {"BLOCK_SIZE": 4096, "num_warps": 16}


def sample(
    logits: Tensor,
    sample: Tensor,
    position: Tensor,
    seed: int,
    step: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token [B] int64, logprob and entropy [B] fp32; the arguments are checked."""
    rows, vocabulary = logits.shape
    token = sample.new_empty(rows)
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(logprob)
    if rows == 0:
        return token, logprob, entropy
    greedy = temperature == 0
    chunks = -(-vocabulary // CHUNK)
    partial = torch.empty(rows, chunks, 4, dtype=torch.float32, device=logits.device)
    index = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    nucleus, best_k = top_p < 1 and not greedy, top_k is not None and not greedy
    seed_low, seed_high = words(seed)
    arguments: dict[str, Any] = {
        "logits_ptr": logits,
        # A vector of one row may have any stride; the kernels count on 1.
        "sample_ptr": sample.contiguous(),
        "position_ptr": position.contiguous(),
        "partial_ptr": partial,
        "index_ptr": index,
        "logits_row_stride": logits.stride(0),
        "vocabulary": vocabulary,
        "inverse_temperature": 1.0 if greedy else 1.0 / temperature,
        "seed_low": seed_low,
        "seed_high": seed_high,
        "step": words(step)[0],
    }
    with on_device(logits.device):
        sweep_kernel[(rows, chunks)](**arguments, GREEDY=greedy, CHUNK=CHUNK, **SIZES)
        settle_kernel[(rows,)](
            **arguments,
            token_ptr=token,
            logprob_ptr=logprob,
            entropy_ptr=entropy,
            chunks=chunks,
            top_p=top_p,
            k=vocabulary if top_k is None else top_k,
            TOP_P=nucleus,
            TOP_K=best_k,
            CHUNKS=power_of_two(chunks),
            **settle_options(vocabulary, nucleus or best_k),
        )
    return token, logprob, entropy


def _settle_sweeps(read: float, top_p: bool, top_k: bool) -> dict[str, Sweep]:
    """What truncation reads again. It nearly always keeps the first winner; one row in twenty draws
    again, as at a top_p of 0.95. Top-k and top-p together search before that. What is predicted
    from these counts is for rows that fill the GPU; fewer take as long as one program does."""
    if not (top_p or top_k):
        return {}
    found = {"_best_before": Sweep(read, 0.05), "_before": Sweep(read, 1.05)}
    return found | ({"_top_k_mass": Sweep(read, 11)} if top_p and top_k else {})


def production_configurations() -> list[Configuration]:
    """What bench/compile_report.py checks: rows padded to multiples of 16."""
    vocabulary = 151_936
    found = []
    for dtype in ("fp32", "bf16", "fp16"):
        common = {
            "logits_ptr": f"*{dtype}",
            "sample_ptr": "*i64",
            "position_ptr": "*i64",
            "partial_ptr": "*fp32",
            "index_ptr": "*i32",
            "logits_row_stride": "i32:16",
            "vocabulary": "i32:16",
            "inverse_temperature": "fp32",
            **dict.fromkeys(["seed_low", "seed_high", "step"], "i32"),
        }
        outputs = {"token_ptr": "*i64", "logprob_ptr": "*fp32", "entropy_ptr": "*fp32"}
        joined = {**common, **outputs, "chunks": "i32", "top_p": "fp32", "k": "i32"}
        for name, greedy in (("sweep", False), ("sweep_greedy", True)):
            constexprs = {"GREEDY": greedy, "CHUNK": CHUNK, **SIZES}
            warps = {"num_warps": constexprs.pop("num_warps")}
            found.append(
                Configuration(
                    f"{name}_{dtype}",
                    sweep_kernel,
                    common,
                    constexprs,
                    warps,
                    ["logits_ptr"],
                    {"_sweep_tile": Sweep(4.0 if dtype == "fp32" else 2.0)},
                )
            )
        for name, top_p, top_k in (
            ("settle", False, False),
            ("settle_top_p", True, False),
            ("settle_top_k", False, True),
            ("settle_top_k_top_p", True, True),
        ):
            sizes = settle_options(vocabulary, top_p or top_k)
            warps = {"num_warps": sizes.pop("num_warps")}
            constexprs = {"TOP_P": top_p, "TOP_K": top_k, "CHUNKS": 32, **sizes}
            streamed = ["logits_ptr"] if top_p or top_k else []
            sweeps = _settle_sweeps(4.0 if dtype == "fp32" else 2.0, top_p, top_k)
            found.append(
                Configuration(
                    f"{name}_{dtype}", settle_kernel, joined, constexprs, warps, streamed, sweeps
                )
            )
    return found
