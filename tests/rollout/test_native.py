"""The native engine against `generate`, against itself in other company, and its refusals."""

from typing import Any

import pytest
import torch
from marks import slow
from rollouts import EOS, NETWORKS, answer, equal_bits, ragged, same_tokens, tiny
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from sodfast.config import LoRAConfig
from sodfast.errors import UsageError
from sodfast.model.language_model import LanguageModel, trained_parameters
from sodfast.model.lora import add_adapters
from sodfast.model.random_weights import shape
from sodfast.rollout import batch, native, passes
from sodfast.rollout.cache import Cache
from sodfast.rollout.decoder import Decoder, unsupported
from sodfast.rollout.engine import SampleKey, Sampling
from sodfast.rollout.hf import HFEngine
from sodfast.rollout.native import CacheSize, NativeEngine, cache_size


@pytest.fixture(params=["qwen3", *slow(*(name for name in NETWORKS if name != "qwen3"))])
def any_model(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny(request.param)


@pytest.mark.slow
def test_greedy_is_generate_token_for_token(any_model: LanguageModel) -> None:
    """Ragged prompts, 120 new tokens, 3 slots that are refilled. Random networks repeat
    themselves, which would hide a wrong position; an entropy above 0.5 nats says they do not."""
    prompts = ragged(5)
    greedy = answer(NativeEngine(any_model, 3), prompts, 120, temperature=0.0)
    for prompt, sample in zip(prompts, greedy, strict=True):
        expected = any_model.network.generate(
            input_ids=prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            do_sample=False,
            max_new_tokens=120,
            eos_token_id=EOS,
            pad_token_id=1,
        )[0, len(prompt) :]
        assert sample.response.equal(expected)
    assert max(len(sample.response) for sample in greedy) == 120
    assert torch.cat([sample.entropy for sample in greedy]).mean() > 0.5


def test_samples_and_logprobs_are_those_of_hf_and_of_a_teacher_forced_forward(
    any_model: LanguageModel,
) -> None:
    prompts = ragged(20)
    ours = answer(NativeEngine(any_model, 7), prompts, 60, temperature=0.8)
    theirs = answer(HFEngine(any_model, 64), prompts, 60, temperature=0.8)
    assert len({len(sample.response) for sample in ours}) > 5
    for a, b in zip(ours, theirs, strict=True):
        assert a.response.equal(b.response) and a.capped == b.capped
        ids = torch.cat([a.prompt, a.response])
        with torch.no_grad():
            logits = any_model.network(ids[None]).logits[0, len(a.prompt) - 1 : -1].double() / 0.8
        logprob = logits.log_softmax(-1)
        expected = logprob.gather(1, a.response[:, None])[:, 0]
        torch.testing.assert_close(a.logprob.double(), expected, rtol=0, atol=1e-5)
        entropy = -(logprob.exp() * logprob).sum(-1)
        torch.testing.assert_close(a.entropy.double(), entropy, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "llama", "mistral-window"])
def test_company_and_order_change_no_bit(name: str) -> None:
    """Alone, among 64, in few slots, in another order, with another width of cache."""
    model = tiny(name)
    prompts = [prompt for prompt in ragged(16) for _ in range(4)]
    together = answer(NativeEngine(model, 64), prompts, 40)
    assert len({len(sample.response) for sample in together}) > 10
    for slots in (5, 16, 33):
        assert equal_bits(answer(NativeEngine(model, slots), prompts, 40), together)
    assert equal_bits(answer(NativeEngine(model, 1), prompts[:12], 40), together[:12])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = NativeEngine(model, 64).generate(
        [prompts[index] for index in order], order, Sampling(1.0, 1.0, 40), SampleKey(2**63 + 11, 4)
    )
    assert equal_bits(shuffled, [together[index] for index in order])
    for index in (0, 17, 63):
        alone = NativeEngine(model, 64).generate(
            [prompts[index]], [index], Sampling(1.0, 1.0, 40), SampleKey(2**63 + 11, 4)
        )
        assert equal_bits(alone, [together[index]])
    longer = answer(NativeEngine(model, 64), prompts, 90)
    for short, long in zip(together, longer, strict=True):
        assert long.logprob[: len(short.logprob)].equal(short.logprob)


@pytest.mark.slow
def test_a_truncated_draw_is_the_same_in_any_company() -> None:
    model = tiny("qwen3")
    prompts = [prompt for prompt in ragged(6) for _ in range(5)]
    for truncation in ({"top_p": 0.8}, {"top_k": 7}, {"top_p": 0.9, "top_k": 20}):
        together = answer(NativeEngine(model, 64), prompts, 30, temperature=0.6, **truncation)
        apart = answer(NativeEngine(model, 3), prompts, 30, temperature=0.6, **truncation)
        assert equal_bits(together, apart)


def test_a_prompt_is_prefilled_once_for_the_samples_that_start_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, seen = tiny("qwen3"), []
    forward = Decoder.forward

    def counting(self: Decoder, token: Tensor, position: Tensor, attend: Any) -> Tensor:
        seen.append(len(token))
        return forward(self, token, position, attend)

    monkeypatch.setattr(Decoder, "forward", counting)
    prompts = [prompt for prompt in ragged(4) for _ in range(8)]
    answer(NativeEngine(model, 64), prompts, 2)
    tokens = sum(len(prompt) for prompt in prompts[::8])
    assert seen[0] == tokens + -tokens % passes.CPU_ROWS


def test_long_prompts_are_prefilled_in_several_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny("llama"), ragged(9, longest=30)
    whole = answer(NativeEngine(model, 64), prompts, 12)
    monkeypatch.setattr(batch, "PREFILL_TOKENS", 20)
    assert equal_bits(answer(NativeEngine(model, 64), prompts, 12), whole)


def test_new_weights_are_used_at_once() -> None:
    """In place as an optimizer writes them, or a parameter replaced as a whole."""
    model, prompts = tiny("qwen3"), ragged(6)
    engine = NativeEngine(model, 4)
    before = answer(engine, prompts, 20)
    with torch.no_grad():
        model.network.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    after = answer(engine, prompts, 20)
    assert equal_bits(after, answer(NativeEngine(model, 4), prompts, 20))
    assert not equal_bits(after, before)
    model.network.model.layers[0].self_attn.q_norm.weight = torch.nn.Parameter(torch.ones(40))
    assert not equal_bits(answer(engine, prompts, 20), after)
    theirs = answer(HFEngine(model, 8), prompts, 20)
    ours = answer(engine, prompts, 20)
    assert all(a.response.equal(b.response) for a, b in zip(ours, theirs, strict=True))


def with_adapters(model: LanguageModel, rank: int = 4) -> LanguageModel:
    model = add_adapters(model, LoRAConfig(rank=rank), 0)
    move_adapters(model, 0)
    return model


def move_adapters(model: LanguageModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_parameters(model.network).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.slow
def test_adapters_are_heard(any_model: LanguageModel) -> None:
    """Under LoRA, too, as `generate` answers, and with the adapters as they are now."""
    prompts = ragged(6)
    before = answer(NativeEngine(any_model, 3), prompts, 30)
    model = with_adapters(any_model)
    assert unsupported(model.network) is None
    engine = NativeEngine(model, 3)
    for seed in (1, 2):
        ours = answer(engine, prompts, 30)
        for a, b in zip(ours, answer(HFEngine(model, 8), prompts, 30), strict=True):
            assert a.response.equal(b.response)
            torch.testing.assert_close(a.logprob, b.logprob, rtol=1e-4, atol=1e-4)
        assert not equal_bits(ours, before)
        before = ours
        move_adapters(model, seed)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [4, *slow(1, 5)])
def test_adapters_answer_the_same_in_other_company(rank: int) -> None:
    model, prompts = with_adapters(tiny("qwen3"), rank), ragged(20)
    together = answer(NativeEngine(model, 64), prompts, 30)
    assert equal_bits(answer(NativeEngine(model, 5), prompts, 30), together)


@pytest.mark.slow
def test_old_cache_memory_changes_nothing() -> None:
    """A CPU keeps the cache's memory from call to call, with what stood in it."""
    model = tiny("mistral")
    engine = NativeEngine(model, 64)
    answer(engine, ragged(40, longest=50), 60)
    engine.memory.fill_(1e3)
    assert equal_bits(
        answer(engine, ragged(12), 30), answer(NativeEngine(model, 64), ragged(12), 30)
    )


@pytest.mark.slow
def test_a_short_budget_means_fewer_slots_and_the_same_answers() -> None:
    model, prompts = tiny("qwen3"), ragged(40)
    width = max(len(prompt) for prompt in prompts) + 30
    slot_gib = (width + -width % 16) * Cache.bytes_per_token(model.network) / 2**30
    free = answer(NativeEngine(model, 64), prompts, 30)
    engine = NativeEngine(model, 64, cache_gib=31.9 * slot_gib)
    assert engine.size(width, 64).rows == 16
    assert equal_bits(answer(engine, prompts, 30), free)
    assert engine.memory.nbytes <= 31.9 * slot_gib * 2**30
    small = NativeEngine(model, 64, cache_gib=15.9 * slot_gib)
    with pytest.raises(UsageError, match=r"lower rollout.max_new_tokens.*rollout.cache_gib"):
        small.require(width)
    with pytest.raises(UsageError, match=rf"{width} tokens"):
        answer(small, prompts, 30)


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_a_gpu_in_fp32_draws_what_generate_draws_there(name: str) -> None:
    model = tiny(name)
    model.network.to("cuda")
    prompts = ragged(20)
    for sampling in ({"temperature": 0.0}, {"temperature": 0.8}, {"top_p": 0.9}):
        ours = answer(NativeEngine(model, 7), prompts, 60, **sampling)
        theirs = answer(HFEngine(model, 64), prompts, 60, **sampling)
        for a, b in zip(ours, theirs, strict=True):
            assert a.response.equal(b.response)
            torch.testing.assert_close(a.logprob, b.logprob, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_repeats_itself_within_a_bucket(dtype: torch.dtype) -> None:
    """8 rows throughout: the same graph, whichever the company. A teacher-forced forward agrees to
    its rounding."""
    model = tiny("qwen3")
    model.network.to("cuda", dtype)
    prompts = [prompt for prompt in ragged(16, longest=40) for _ in range(2)]
    together = answer(NativeEngine(model, 8), prompts, 50)
    assert equal_bits(answer(NativeEngine(model, 8), prompts, 50), together)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = NativeEngine(model, 8).generate(
        [prompts[index] for index in order], order, Sampling(1.0, 1.0, 50), SampleKey(2**63 + 11, 4)
    )
    same = [a.response.equal(together[i].response) for a, i in zip(shuffled, order, strict=True)]
    assert sum(same) >= (32 if dtype == torch.float32 else 24)
    for sample in together[:8]:
        ids = torch.cat([sample.prompt, sample.response]).cuda()
        with torch.no_grad():
            logits = model.network(ids[None]).logits[0, len(sample.prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, sample.response.cuda()[:, None])[:, 0].cpu()
        atol = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(sample.logprob, expected, rtol=0, atol=atol)


@pytest.mark.gpu
def test_a_gpu_that_runs_out_of_pages_draws_what_it_draws_with_enough() -> None:
    """In fp32 the same tokens, however many rows the batch had at each step."""
    model = tiny("qwen3")
    model.network.to("cuda")
    prompts = [prompt for prompt in ragged(5, longest=100) for _ in range(4)]
    enough = answer(NativeEngine(model, 32), prompts, 150)
    for pages in (5, 20):  # of which one sequence may need four, and one is nobody's
        gib = (pages + 0.5) * 64 * Cache.bytes_per_token(model.network) / 2**30
        short = answer(NativeEngine(model, 32, cache_gib=gib), prompts, 150)
        assert same_tokens(short, enough)


# ---------------------------------------------------------------- what a budget holds


def test_whole_slots_are_what_the_budget_holds() -> None:
    """On a CPU, where a multiple of 16 rows run: 100 tokens in steps of 16 positions."""
    network = tiny("qwen3").network
    slot = 112 * Cache.bytes_per_token(network)

    def size(budget: float, rows: int = 1000) -> CacheSize:
        return cache_size(network, 100, rows, budget * slot / 2**30, 0, on_gpu=False)

    assert [size(budget).rows for budget in (16.1, 31.9, 40.5)] == [16, 16, 32]
    assert size(40.5, rows=17) == CacheSize(17, None, 32, 32 * slot)
    assert size(40.5).at_once(50, 4, 50) == 32
    assert [passes.idle_rows(rows, False) for rows in (1, 16, 17)] == [15, 0, 15]
    assert passes.idle_rows(17, True) == 0
    assert cache_size(network, 100, 99, None, 33 * slot / 0.5, on_gpu=False).rows == 32
    with pytest.raises(UsageError, match=r"keys and values of 16 sequences of 100 tokens"):
        cache_size(network, 100, 99, None, 20 * slot, on_gpu=False)


def test_pages_are_what_the_budget_holds() -> None:
    """On a GPU: 64 positions each, two for 100 tokens, and one that belongs to nobody."""
    network = tiny("qwen3").network
    page = 64 * Cache.bytes_per_token(network)

    def size(budget: float, rows: int = 1000) -> CacheSize:
        return cache_size(network, 100, rows, budget * page / 2**30, 0, on_gpu=True)

    assert size(3.01) == CacheSize(2, 64, 3, 3 * page)
    assert size(40.9) == CacheSize(39, 64, 40, 40 * page)
    assert size(40.9, rows=7) == CacheSize(7, 64, 15, 15 * page)  # no more than they can need
    # A share of what is free, where no budget is given; nothing where more is taken than there is.
    assert cache_size(network, 100, 99, None, 20.1 * page / 0.85, on_gpu=True).pages == 20
    for budget in (-5.0, 2.9 * page / 0.85):
        with pytest.raises(UsageError, match=r"keys and values of 1 sequence of 100 tokens"):
            cache_size(network, 100, 99, None, budget, on_gpu=True)


def test_an_evaluation_at_8b_holds_200_rows_at_once() -> None:
    """100 questions × 16 at the preset's caps, in the cache that its plan finds room for. Whole
    slots would be 28."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**shape("Qwen/Qwen3-8B")), dtype=torch.bfloat16
        )
    assert Cache.bytes_per_token(network) == 144 * 2**10
    free = (78 - 2 * 15.26) * 2**30  # weights and 8-bit moments are there
    size = cache_size(network, 2048 + 8192, 256, None, free, on_gpu=True)
    assert size.bytes <= 0.85 * free
    assert size.bytes // (10_240 * 144 * 2**10) == 28
    assert size.at_once(2048, 16, 8192) >= 200
    assert size.at_once(2048, 4, 8192) >= 64 * 2
    assert size.at_once(2048, 1, 8192) < size.at_once(2048, 4, 8192)  # shared prompts take less
    short = cache_size(network, 2048 + 8192, 256, 15.0, free, on_gpu=True)
    assert 1 < short.at_once(2048, 16, 8192) < 100


def test_the_caches_budget_knows_limit_and_reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "mem_get_info": (60, 140),
        "get_per_process_memory_fraction": 0.5,
        "memory_reserved": 30,
        "memory_allocated": 20,
    }
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert native._free_bytes(torch.device("cuda")) == 70 - 20  # the limit
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)
    assert native._free_bytes(torch.device("cuda")) == 60 + 30 - 20  # free or kept for reuse
