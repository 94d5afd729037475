"""Rollouts: the native engine against `generate`, continuous batching, and the bandwidth roofline.

    python bench/bench_rollout.py      (or make bench; the last line is JSON; exit 1: target missed)

On a CPU, in the threads of the lab:
* the lab's rollout phase, 16 prompts × 4 samples of its start model: native, our hf engine, and
  `generate` used plainly, with its own sampling and no scores;
* long-tailed lengths, 64 prompts: an output head of zeros makes all V tokens equally likely in
  every state, so answers end after a geometric number of tokens, whatever the engine. The native
  engine draws the lengths, and its rivals are made to end each answer at the same one. (Continuous
  batching is told each request's length, which no rollout knows, and sets itself up in each call.)

On a GPU, as part `rollout` of gpu_suite.py (its cases are in suite_rollout.py), at the shape of
Qwen3-8B in bf16 with random weights:
* milliseconds of a decode step under the CUDA graph, 64 slots at 2k and 128 at 1.5k positions,
  against weights and cache read once at the bandwidth measured in the same run;
* tokens a second of whole answers beside `generate` and continuous batching;
* one layer's `decode_attention`, 64 sequences of 2k and 4 of 8k positions, against a copy;
* correctness that only a GPU can show: tokens equal to `generate`'s, samples that do not depend on
  their batch, and the error of bf16 against that of transformers.

All cases take turns in each round; medians. Peers that do not run are listed with the reason.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from sodfast_kernels import decode_attention
from suite_timing import Work, clock, cpu_turn, gpu_turn
from torch import Tensor

from sodfast.config import load_config
from sodfast.model.joined import join_weights
from sodfast.model.language_model import LanguageModel
from sodfast.model.packing import own_attention
from sodfast.rollout.admission import Draw
from sodfast.rollout.batch import STEPS_PER_LOOK, Batch
from sodfast.rollout.cache import PAGE, Cache, up_to_step
from sodfast.rollout.engine import SampleKey, Sampling
from sodfast.rollout.hf import HFEngine, _generating_as, left_padded
from sodfast.rollout.native import NativeEngine
from sodfast.run.environment import environment

Progress = Callable[[str], None]
# What one turn of a case gives: its seconds and the tokens it answered with.
Turn = Callable[[int], tuple[float, int]]
# Pays a rival's first call, which compiles and allocates.
WARM_UP = 1
CPU_TARGETS = {"lab": 1.5, "long tail": 2.0}
# Tokens of a block of transformers' paged cache, by default (the option that sets them has had two
# names, so it is left alone), and the patience with its answers.
RIVAL_PAGE, RIVAL_SECONDS = 256, 120


def take_turns(cases: dict[str, Turn], rounds: int, ours: str = "native") -> dict[str, Any]:
    """Medians of seconds and of tokens a second; a rival's failure is its result."""
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in cases}
    failed: dict[str, str] = {}
    for number in range(WARM_UP + rounds):
        for name, case in cases.items():
            if name in failed:
                continue
            try:
                turn = case(number)
            except Exception as reason:  # a rival's fault must not hide the others' times
                if name == ours:
                    raise
                failed[name] = f"{type(reason).__name__}: {reason}"[:300]
                continue
            if number >= WARM_UP:
                found[name].append(turn)
    rows: dict[str, Any] = {name: {"failed": reason} for name, reason in failed.items()}
    for name, turns in found.items():
        if name not in failed:
            rows[name] = {
                "seconds": median(seconds for seconds, _ in turns),
                "tokens_per_second": median(tokens / seconds for seconds, tokens in turns),
            }
    for name, row in rows.items():
        if name != ours and "failed" not in row:
            row["ours_is_faster"] = rows[ours]["tokens_per_second"] / row["tokens_per_second"]
    return rows


def timed(device: torch.device, answer: Callable[[], Sequence[int]]) -> tuple[float, int]:
    """Seconds of `answer`, and the sum of the lengths that it returns."""
    start = clock(device)
    lengths = answer()
    return clock(device) - start, sum(lengths)


# ---------------------------------------------------------------- the ways to answer


def by_engine(
    engine: NativeEngine | HFEngine, prompts: Sequence[Tensor], tokens: int
) -> Callable[[int], list[int]]:
    """Lengths of a sample of each prompt; the turn is the step of the key."""

    def answer(turn: int) -> list[int]:
        sampling = Sampling(1.0, 1.0, tokens)
        samples = engine.generate(prompts, range(len(prompts)), sampling, SampleKey(1, turn))
        return [len(sample.response) for sample in samples]

    return answer


def by_generate(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    tokens: int,
    lengths: Sequence[int] | None = None,
) -> Callable[[int], list[int]]:
    """`generate` as a user would call it. With `lengths` every answer ends there and an EOS token
    is a token like others; without, it ends at an EOS token or the cap."""
    from transformers import StoppingCriteriaList

    input_ids, mask = left_padded(prompts, model.pad_id)
    width = input_ids.shape[1]
    ends = None if lengths is None else torch.tensor(lengths, device=model.device)

    def ended(input_ids: Tensor, scores: Tensor, **others: Any) -> Tensor:
        return input_ids.shape[1] - width >= ends

    config = plain_config(model, tokens, ends_at_eos=ends is None)

    def answer(turn: int) -> list[int]:
        torch.manual_seed(turn)
        with own_attention(model.network), _generating_as(model.network, config):
            found = model.network.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                stopping_criteria=StoppingCriteriaList([] if ends is None else [ended]),
            )[:, width:].cpu()
        if lengths is not None:
            assert found.shape[1] == max(lengths)
            return list(lengths)
        stops = torch.isin(found, torch.tensor(model.eos_ids))
        return [int(row.nonzero()[0]) + 1 if row.any() else len(row) for row in stops]

    return answer


def by_continuous_batching(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    tokens: int,
    lengths: Sequence[int] | None = None,
) -> Callable[[int], list[int]]:
    """transformers' own continuous batching; with `lengths` each request's cap is its length."""
    from transformers.generation import ContinuousBatchingConfig

    asked = [prompt.tolist() for prompt in prompts]
    caps = [tokens] * len(asked) if lengths is None else list(lengths)

    config = plain_config(model, tokens, ends_at_eos=lengths is None)
    # Room for all requests at once. By itself transformers takes nine tenths of the device's
    # memory, whatever this process may have of it, and on a CPU far more than this needs.
    longest = max(len(ids) + cap for ids, cap in zip(asked, caps, strict=True))
    blocks, batch = len(asked) * (longest // RIVAL_PAGE + 1), max(1024, sum(map(len, asked)))

    def answer(turn: int) -> list[int]:
        deadline = time.monotonic() + RIVAL_SECONDS
        with (
            own_attention(model.network),
            _generating_as(model.network, config),
            model.network.continuous_batching_context_manager(
                generation_config=config,
                continuous_batching_config=ContinuousBatchingConfig(
                    num_blocks=blocks, max_batch_tokens=batch, seed=turn
                ),
                block=True,
                timeout=5,
            ) as manager,
        ):
            names = [
                manager.add_request(ids, max_new_tokens=cap)
                for ids, cap in zip(asked, caps, strict=True)
            ]
            results: dict[str, Any] = {}
            while len(results) < len(names):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    results[result.request_id] = result
                elif not manager.is_running():
                    raise RuntimeError("its thread ended before the answers did")
                elif time.monotonic() > deadline:
                    raise RuntimeError(f"no answers after {RIVAL_SECONDS} s")
        errors = [result.error for result in results.values() if result.error is not None]
        if errors:
            raise RuntimeError(f"{len(errors)} answers failed or were truncated: {errors[0]}")
        found = [len(results[name].generated_tokens) for name in names]
        if lengths is not None:
            assert found == caps
        return found

    return answer


def plain_config(model: LanguageModel, tokens: int, ends_at_eos: bool) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=tokens,
        eos_token_id=list(model.eos_ids) if ends_at_eos else None,
        pad_token_id=model.pad_id,
    )


# ---------------------------------------------------------------- on a CPU


def lab_phase(rounds: int, progress: Progress) -> dict[str, Any]:
    """One step's rollouts of the lab's default run. `generate` draws tokens of its own; it is made
    to answer at native's lengths, since a phase takes as long as its longest answer."""
    from sodfast.commands import build_model, pick_device
    from sodfast.model.language_model import to_ids
    from sodfast.tasks import build_task

    config = load_config(None, ["device=cpu"])
    progress("building the lab (cached after the first time)")
    model = build_model(config, pick_device("cpu"))
    torch.set_num_threads(config.threads or torch.get_num_threads())
    questions = build_task(config.task).train[: config.rollout.prompts_per_step]
    prompts = [
        to_ids(model.encode_question(question))
        for question in questions
        for _ in range(config.rollout.samples_per_prompt)
    ]
    tokens = config.rollout.max_new_tokens
    native = by_engine(NativeEngine(model, config.rollout.batch_size), prompts, tokens)

    def generate(turn: int) -> Any:
        as_long = by_generate(model, prompts, tokens, native(turn))
        return timed(model.device, lambda: as_long(turn))

    cases = {
        "native": as_turn(model.device, native),
        "generate": generate,
        "hf": as_turn(
            model.device, by_engine(HFEngine(model, config.rollout.batch_size), prompts, tokens)
        ),
    }
    return take_turns(cases, rounds)


def as_turn(device: torch.device, answer: Callable[[int], list[int]]) -> Turn:
    return lambda turn: timed(device, lambda: answer(turn))


@dataclass(frozen=True)
class Shape:
    """A Qwen3; the default is Qwen3-8B (its config.json)."""

    hidden: int = 4096
    inner: int = 12_288
    layers: int = 36
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 151_936
    positions: int = 40_960


LAB_SHAPE = Shape(128, 384, 3, 4, 4, 32, 32, 1024)
TINY_SHAPE = Shape(64, 128, 2, 4, 2, 32, 97, 512)


def build(shape: Shape, device: torch.device, dtype: torch.dtype, spread: float) -> LanguageModel:
    """Random weights of standard deviation `spread`, made on the device and laid out as those of a
    loaded model: decoding then does one product in place of several. EOS is token 1."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.positions,
        initializer_range=spread,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            network = Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    join_weights(network, device)
    # Answers stay token ids here, so there is no tokenizer.
    return LanguageModel(network, None, (1,), 0)


def random_prompts(count: int, length: int, shape: Shape) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return list(torch.randint(2, shape.vocabulary, (count, length), generator=generator))


@torch.no_grad()
def long_tail(rounds: int, count: int = 64, shape: Shape = LAB_SHAPE) -> dict[str, Any]:
    """Answers of geometric length, mean `shape.vocabulary`, cap ten times that."""
    model = build(shape, torch.device("cpu"), torch.float32, 0.02)
    model.head.zero_()
    cap = 10 * shape.vocabulary
    prompts = random_prompts(count, 12, shape)
    ours = by_engine(NativeEngine(model, count), prompts, cap)
    drawn: dict[int, list[int]] = {}  # the lengths of each turn, by the engine that goes first

    def native(turn: int) -> tuple[float, int]:
        start = clock(model.device)
        drawn[turn] = ours(turn)
        return clock(model.device) - start, sum(drawn[turn])

    def forced(way: Callable[..., Callable[[int], list[int]]]) -> Turn:
        def case(turn: int) -> tuple[float, int]:
            answer = way(model, prompts, cap, drawn[turn])
            return timed(model.device, lambda: answer(turn))

        return case

    rows = take_turns(
        {
            "native": native,
            "generate": forced(by_generate),
            "continuous batching": forced(by_continuous_batching),
            "hf": as_turn(model.device, by_engine(HFEngine(model, count), prompts, cap)),
        },
        rounds,
    )
    measured = [drawn[turn] for turn in range(WARM_UP, WARM_UP + rounds)]
    mean = sum(map(sum, measured)) / (count * rounds)
    return {"mean_length": mean, "longest": [max(lengths) for lengths in measured], "cases": rows}


def measure_cpu(progress: Progress, rounds: int = 9) -> dict[str, Any]:
    lab = lab_phase(rounds, progress)
    tail = long_tail(rounds)
    for title, rows in (("lab", lab), ("long tail", tail["cases"])):
        for name, row in rows.items():
            progress(f"{title}: {name}: {json.dumps(row)}")
    targets = [
        target(f"{title}: native over generate", rows["generate"]["ours_is_faster"], least)
        for (title, least), rows in zip(CPU_TARGETS.items(), (lab, tail["cases"]), strict=True)
    ]
    return {
        "lab": lab,
        "long_tail": tail,
        "rounds": rounds,
        "targets": targets,
        "environment": environment(torch.get_num_threads(), "cpu"),
    }


def target(name: str, value: float, limit: float, at_most: bool = False) -> dict[str, Any]:
    met = value <= limit if at_most else value >= limit
    return {"target": name, "value": value, "limit": limit, "at_most": at_most, "met": met}


# ---------------------------------------------------------------- on a GPU


def bandwidth(device: torch.device, size: int) -> dict[str, float]:
    """Bytes a second of a copy (read and written) and of a read, over buffers of `size` bytes."""
    source = torch.ones(size // 2, dtype=torch.bfloat16, device=device)
    result = torch.empty_like(source)
    rates = {}
    for name, moved, run in (
        ("copy", 2 * size, lambda: result.copy_(source)),
        ("read", size, lambda: source.view(-1, 4096).amax(1)),
    ):
        run()
        times = []
        for _ in range(7):
            start = clock(device)
            for _ in range(4):
                run()
            times.append((clock(device) - start) / 4)
        rates[name] = moved / median(times)
    return rates


@torch.no_grad()
def decode_step(
    model: LanguageModel, slots: int, context: int, steps: int, rates: dict[str, float]
) -> dict[str, Any]:
    """A decode step with all slots alive, `context` positions cached on average."""
    vocabulary = model.head.shape[0]
    shape = Shape(vocabulary=vocabulary)
    prompts = random_prompts(slots, context - steps // 2, shape)
    stretch = STEPS_PER_LOOK[model.device.type]
    width = up_to_step(context + 2 * steps)
    sampling = Sampling(1.0, 1.0, width - len(prompts[0]))
    # An id that no token has: a row that idles would read nothing.
    endless = LanguageModel(model.network, None, (-1,), model.pad_id)
    draws = [Draw(i, prompt, i, tuple(prompt.tolist())) for i, prompt in enumerate(prompts)]
    page = PAGE[model.device.type]
    pages = 0 if page is None else 1 + slots * -(-width // page)
    batch = Batch(
        endless, draws, slots, width, sampling, SampleKey(1, 1), page=page, pages=pages
    )  # fmt: skip
    batch.advance()  # prompts, and on a GPU the first steps, with their graph
    batch.advance()
    cached, drawn = len(prompts[0]) + batch.steps, steps // stretch * stretch
    start = clock(model.device)
    while batch.steps < cached - len(prompts[0]) + drawn:
        batch.advance()
    taken = clock(model.device) - start
    # What every step reads: all weights but the embedding's unused rows, and the filled cache.
    weights = sum(p.numel() * p.element_size() for p in model.network.parameters())
    embedding = model.network.get_input_embeddings().weight
    if embedding is not model.head:
        weights -= embedding.numel() * embedding.element_size()
    positions = cached + (drawn + 1) / 2
    read = weights + slots * positions * Cache.bytes_per_token(model.network)
    step = taken / drawn
    return {
        "slots": slots,
        "positions": positions,
        "milliseconds": 1e3 * step,
        "tokens_per_second": slots / step,
        "bytes": read,
        "share_of_roofline": read / max(rates.values()) / step,
    }


@torch.no_grad()
def attention_step(
    device: torch.device, slots: int, context: int, layers: int, shape: Shape | None = None
) -> dict[str, Any]:
    """Milliseconds of one layer's `decode_attention`, and the bytes a second that it reads.

    On a GPU the layers, each with pages of its own in a random order, are one CUDA graph, launched
    while the GPU spins: so the host's time does not count, and none is found in the GPU's L2."""
    shape = shape or Shape()
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    columns = -(-context // PAGE["cuda"])
    table = torch.randperm(slots * columns, device=device).int().view(slots, columns)
    used = torch.full((slots,), context, dtype=torch.int32, device=device)
    size = (layers, 2, slots * columns, PAGE["cuda"], shape.kv_heads, shape.head_dim)
    caches = torch.randn(size, device=device, dtype=dtype)
    query = torch.randn(slots, 1, shape.heads, shape.head_dim, device=device, dtype=dtype)

    def attend() -> None:
        for keys, values in caches:
            decode_attention(query, keys, values, table, used)

    attend()  # compiles
    run = attend
    if gpu:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            attend()
        run = graph.replay
    work = Work(run)
    turns = [gpu_turn(work, spin=1e-3) if gpu else cpu_turn(work) for _ in range(7)]
    taken = median(turn["seconds"] for turn in turns) / layers
    moved = 2 * slots * context * shape.kv_heads * shape.head_dim * query.element_size()
    return {"milliseconds": 1e3 * taken, "bytes": moved, "bytes_per_second": moved / taken}


def whole_answers(
    model: LanguageModel, slots: int, prompt: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Tokens a second of `slots` answers of `tokens` tokens after prompts of `prompt`."""
    prompts = random_prompts(slots, prompt, Shape(vocabulary=model.head.shape[0]))
    lengths = [tokens] * slots
    endless = LanguageModel(model.network, None, (-1,), model.pad_id)
    answers = {
        "native": by_engine(NativeEngine(endless, slots), prompts, tokens),
        "generate": by_generate(model, prompts, tokens, lengths),
        "continuous batching": by_continuous_batching(model, prompts, tokens, lengths),
    }
    cases = {name: as_turn(model.device, answer) for name, answer in answers.items()}
    return take_turns(cases, rounds)


def check_equality(device: torch.device) -> list[dict[str, Any]]:
    """Greedy tokens in fp32 against `generate`, and the error of sampled log-probs in bf16 against
    that of transformers' own bf16 forward on the same tokens."""
    model = build(TINY_SHAPE, device, torch.float32, 0.3)
    prompts = [*random_prompts(7, 9, TINY_SHAPE), *random_prompts(6, 30, TINY_SHAPE)]
    tokens = [
        [
            one.response
            for one in engine.generate(prompts, range(13), Sampling(0.0, 1.0, 100), SampleKey(1, 1))
        ]
        for engine in (NativeEngine(model, 4), HFEngine(model, 16))
    ]
    equal = sum(a.equal(b) for a, b in zip(*tokens, strict=True)) / len(prompts)

    half = build(TINY_SHAPE, device, torch.bfloat16, 0.3)
    model.network.load_state_dict(half.network.state_dict())
    samples = NativeEngine(half, 8).generate(
        prompts, range(13), Sampling(1.0, 1.0, 100), SampleKey(1, 1)
    )
    ours, theirs = 0.0, 0.0
    for one in samples:
        exact, peer = (forced_logprob(which, one.prompt, one.response) for which in (model, half))
        ours += float((one.logprob - exact).abs().sum())
        theirs += float((peer - exact).abs().sum())
    return [
        target("greedy answers equal to generate's, fp32", equal, 1.0),
        target("error of log-probs over transformers', bf16", ours / theirs, 2.0, at_most=True),
    ]


@torch.no_grad()
def forced_logprob(model: LanguageModel, prompt: Tensor, response: Tensor) -> Tensor:
    ids = torch.cat([prompt, response]).to(model.device)
    logits_LV = model.network(ids[None]).logits[0, len(prompt) - 1 : -1].float()
    return logits_LV.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0].cpu()


def check_repeatability(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The same call twice, then its samples in another order and among others.

    Repeated, a call has the same products of the same shapes, so the same bits. Other company
    changes the shapes of some (a prefill's on a GPU) and so their rounding: fp32 leaves every token
    as it was, bf16 turns some draws, and all that follows them.
    """
    model = build(TINY_SHAPE, device, dtype, 0.3)
    endless = LanguageModel(model.network, None, (-1,), model.pad_id)  # all end at the cap
    prompts = random_prompts(60, 20, TINY_SHAPE)
    engine = NativeEngine(endless, 32)

    def answers(order: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        samples = engine.generate(
            [prompts[number] for number in order], order, Sampling(1.0, 0.9, 60), SampleKey(1, 1)
        )
        return {n: (one.response, one.logprob) for n, one in zip(order, samples, strict=True)}

    alone, again = answers(range(40)), answers(range(40))
    bits = [all(map(torch.equal, alone[n], again[n])) for n in alone]
    # On a CPU the log-probs, too: there company changes no bit.
    kept = slice(2 if device.type == "cpu" else 1)
    stayed = [
        all(map(torch.equal, alone[n][kept], other[n][kept]))
        for other in (answers(range(39, -1, -1)), answers(range(60)))
        for n in alone
    ]
    exact = device.type == "cpu" or dtype == torch.float32
    return [
        target("samples of a call that is repeated equal bit for bit", sum(bits) / len(bits), 1.0),
        target(
            "samples that stay in other company",
            sum(stayed) / len(stayed),
            1.0 if exact else 0.75,
        ),
    ]


def test_rollout(benchmark: Any) -> None:
    benchmark.group = "rollout"
    benchmark.extra_info.update(
        benchmark.pedantic(measure_cpu, args=(lambda text: None, 3), rounds=1, iterations=1)
    )


def main() -> int:
    def progress(text: str) -> None:
        print(text, flush=True)

    if torch.cuda.is_available():
        from gpu_suite import main as suite

        return suite(["rollout"])
    result = measure_cpu(progress)
    for row in result["targets"]:
        progress(f"{'met   ' if row['met'] else 'MISSED'} {row['target']:55} {row['value']:.4g}")
    print(json.dumps(result))
    return 0 if all(row["met"] for row in result["targets"]) else 1


if __name__ == "__main__":
    sys.exit(main())
