"""Drafts change no answer, whatever they are and however many; which ones there are, and how many
tokens a pass has. Whole runs: test_speculation_in_runs.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import exhaustive, slow
from rollouts import EOS, equal_bits, ragged, same_tokens, tiny
from torch import Tensor

from sodfast.config import LoRAConfig
from sodfast.model.language_model import LanguageModel, to_ids, trained_parameters
from sodfast.model.load import load_model
from sodfast.model.lora import add_adapters
from sodfast.rollout import batch, native, speculation
from sodfast.rollout.admission import Draw
from sodfast.rollout.cache import PAGE, Cache, up_to_step
from sodfast.rollout.engine import Sample, SampleKey, Sampling
from sodfast.rollout.native import NativeEngine
from sodfast.rollout.speculation import (
    FIRST_ROWS,
    MOST_TOKENS,
    PRIOR_SHARE,
    Answers,
    Cost,
    Drafts,
    Pace,
    Setting,
    count_texts,
    draft_bytes,
    resolved,
)

SETTINGS: list[Setting] = [1, 3, 7, 15, "auto"]
PROMPTS = [prompt for prompt in ragged(6) for _ in range(4)]
# Cold enough for answers that repeat themselves and one another.
SAMPLING = Sampling(temperature=0.5, top_p=0.9, max_new_tokens=40)


ENDS = (EOS, *range(2, 97, 9))  # so many that cold answers of a random network end


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(tiny("qwen3").network, None, ENDS, 1)


def asked(
    engine: NativeEngine,
    prompts: Sequence[Tensor] = PROMPTS,
    sampling: Sampling = SAMPLING,
    step: int = 4,
) -> list[Sample]:
    return engine.generate(prompts, range(len(prompts)), sampling, SampleKey(2**63 + 11, step))


def lossless(
    model: LanguageModel,
    setting: Setting,
    rows: int = 64,
    prompts: Sequence[Tensor] = PROMPTS,
    sampling: Sampling = SAMPLING,
) -> None:
    """The first call has siblings alone to guess from; the second has other random numbers, so that
    its drafts fail in the middle; those of the third hold, up to the end of each answer."""
    plain, ours = NativeEngine(model, rows), NativeEngine(model, rows, None, setting)
    for step in (4, 5, 5):
        assert equal_bits(
            asked(ours, prompts, sampling, step), asked(plain, prompts, sampling, step)
        )
    assert plain.tokens_per_pass == 1 or sampling.max_new_tokens == 1
    assert ours.tokens_per_pass is not None
    if sampling.max_new_tokens > 8:
        assert ours.tokens_per_pass > 1.3


@pytest.mark.parametrize("setting", [7, *slow(1, 3, 15, "auto")])
def test_answers_are_those_without_drafts(model: LanguageModel, setting: Setting) -> None:
    ended = [int(sample.response[-1]) in ENDS for sample in asked(NativeEngine(model, 64))]
    assert 3 < sum(ended) < len(ended)  # some end inside a draft, others at the cap
    lossless(model, setting)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "setting"), [(5, 3), (5, 15), (5, "auto"), (17, 15), *exhaustive((1, "auto"))]
)
def test_answers_are_those_without_drafts_where_rows_are_refilled(
    model: LanguageModel, setting: Setting, rows: int
) -> None:
    lossless(model, setting, rows)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [7, "auto"])
def test_answers_are_those_without_drafts_where_the_cache_is_short(
    model: LanguageModel, setting: Setting
) -> None:
    """Sixteen rows, the least of a CPU: the other eight samples wait for one."""
    positions = up_to_step(max(map(len, PROMPTS)) + SAMPLING.max_new_tokens)
    gib = 16.5 * positions * Cache.bytes_per_token(model.network) / 2**30
    short = NativeEngine(model, 64, gib, setting)
    assert short.size(positions, len(PROMPTS)).rows == 16 < len(PROMPTS)
    plain = NativeEngine(model, 64)
    for step in (4, 5, 5):
        assert equal_bits(asked(short, step=step), asked(plain, step=step))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 16, 100, *exhaustive(1024)])
def test_any_number_of_rows(model: LanguageModel, count: int) -> None:
    prompts = [prompt for prompt in ragged(-(-count // 8)) for _ in range(8)][:count]
    for setting in (3, "auto"):
        engine: Any = NativeEngine(model, count, None, setting)
        sampling = Sampling(0.5, 0.9, 24)
        plain = asked(NativeEngine(model, count), prompts, sampling)
        for _ in range(2):
            assert equal_bits(asked(engine, prompts, sampling), plain)


@pytest.mark.slow
@pytest.mark.parametrize("cap", [1, 2, 9])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_caps_within_a_draft(model: LanguageModel, cap: int, temperature: float) -> None:
    lossless(model, 15, sampling=Sampling(temperature, 1.0, cap))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2-window", "llama", "mistral-window"])
def test_other_architectures(name: str) -> None:
    lossless(tiny(name), 7, rows=9)


@pytest.mark.slow
def test_adapters(model: LanguageModel) -> None:
    adapted = add_adapters(tiny("qwen3"), LoRAConfig(rank=5), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained_parameters(adapted.network).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    lossless(adapted, 7, rows=9)


@pytest.mark.slow
def test_stop_strings_within_a_draft(wide_model: Path) -> None:
    model = load_model(str(wide_model), torch.device("cpu"))
    prompts = [to_ids(model.encode(text)) for text in ("17*8+6=", "2*2+1=") for _ in range(6)]
    for stop in (("=1",), ("5", "12"), ("+",)):
        sampling = Sampling(0.9, 1.0, 20, stop=stop)
        plain = asked(NativeEngine(model, 5), prompts, sampling)
        texts = [model.decode(sample.response) for sample in plain]
        assert any(end in text for text in texts for end in stop)
        lossless(model, 7, 5, prompts, sampling)
        ours = NativeEngine(model, 5, None, 7)
        kept = sum(len(sample.response) - 1 for sample in asked(ours, prompts, sampling))
        assert ours.tokens_per_pass == kept / ours.pace.passes  # none of those behind a stop string


@pytest.mark.slow
@pytest.mark.parametrize("pages", [200, *exhaustive(14)])
def test_in_pages_with_steps_queued_ahead(
    model: LanguageModel, pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: 14 pages are so few that rows wait and start over. Attention of several queries
    sums in another order there, so the tokens are the same and not all bits."""
    expected = {step: asked(NativeEngine(model, 64), step=step) for step in (4, 5)}
    monkeypatch.setitem(PAGE, "cpu", 16)
    monkeypatch.setitem(batch.STEPS_PER_LOOK, "cpu", 8)
    monkeypatch.setitem(batch.QUEUED_LOOKS, "cpu", 2)
    budget = (pages + 0.5) * 16 * Cache.bytes_per_token(model.network) / 2**30
    for setting in (3, 15):
        engine: Any = NativeEngine(model, 64, budget, setting)
        for step in (4, 5, 5):
            assert same_tokens(asked(engine, step=step), expected[step])
        assert engine.tokens_per_pass > 1.3


@pytest.mark.slow
def test_calls_of_several_kinds_with_the_same_prompts(model: LanguageModel) -> None:
    """As in a run: rollouts, probes with other numbers of samples, and two examinations that share
    a question. Each kind has a pace of its own, and all read what the others were answered."""
    plain, ours = NativeEngine(model, 9), NativeEngine(model, 9, None, "auto")
    kinds = {
        1: (PROMPTS, SAMPLING),
        2: (PROMPTS[:10], Sampling(1.0, 1.0, 30)),
        3: (PROMPTS[7:], Sampling(0.0, 1.0, 12)),
        4: (PROMPTS[8:] + PROMPTS[:4], Sampling(0.6, 0.95, 50, top_k=5)),
    }
    for step in (1, 2, 2):
        for seed, (prompts, sampling) in kinds.items():
            key, numbers = SampleKey(seed, step), range(len(prompts))
            expected = plain.generate(prompts, numbers, sampling, key)
            assert equal_bits(ours.generate(prompts, numbers, sampling, key), expected)
    assert ours.paces.keys() == kinds.keys()
    assert len({id(pace.cost) for pace in ours.paces.values()}) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("setting", [1, 7, 15])
def test_a_gpu_in_fp32_draws_the_tokens_that_it_draws_without_drafts(setting: Setting) -> None:
    """Through graphs of several numbers of rows and drafts; log-probs to rounding."""
    model = LanguageModel(tiny("qwen3").network.to("cuda"), None, ENDS, 1)
    plain, ours = NativeEngine(model, 64), NativeEngine(model, 64, None, setting)
    for step in (4, 5, 5):
        for a, b in zip(asked(ours, step=step), asked(plain, step=step), strict=True):
            assert a.response.equal(b.response) and a.capped == b.capped
            torch.testing.assert_close(a.logprob, b.logprob, rtol=0, atol=1e-4)
            torch.testing.assert_close(a.entropy, b.entropy, rtol=0, atol=1e-4)
    assert ours.tokens_per_pass is not None and ours.tokens_per_pass > 1.3


def test_sizes_that_are_not_exact_on_a_cpu_are_left_alone(tiny_model: Path) -> None:
    small = load_model(str(tiny_model), torch.device("cpu"))
    assert not NativeEngine(small, 4, None, 7).speculates
    assert NativeEngine(tiny("qwen3"), 4, None, 7).speculates
    assert not NativeEngine(tiny("qwen3"), 4, None, False).speculates
    odd = tiny("qwen3")
    odd.network.config.hidden_size += 8
    assert not NativeEngine(odd, 4, None, 7).speculates


# ---------------------------------------------------------------- which drafts, and how many


def test_a_call_with_too_many_texts_checks_no_drafts(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(0.5, 0.9, 12)
    engine: Any = NativeEngine(model, 64, None, 7)
    plain = asked(NativeEngine(model, 64), sampling=sampling)
    monkeypatch.setattr(native, "MOST_TEXT_BYTES", draft_bytes(len(PROMPTS), 20))
    assert equal_bits(asked(engine, sampling=sampling), plain) and engine.tokens_per_pass == 1
    monkeypatch.undo()  # what that call has answered is remembered
    assert equal_bits(asked(engine, sampling=sampling), plain) and engine.tokens_per_pass > 2


def draws(*prompts: tuple[int, ...]) -> list[Draw]:
    return [Draw(place, torch.tensor(ids), place, ids) for place, ids in enumerate(prompts)]


def sample(*tokens: int) -> Tensor:
    return torch.tensor(tokens)


def test_the_same_samples_last_answer_comes_first_then_siblings_then_the_others() -> None:
    earlier = Answers()
    earlier.remember(
        draws((5, 6), (5, 6), (7, 8)), {0: sample(1, 2), 1: sample(3), 2: sample(4, 4, 4)}
    )
    asking = draws((5, 6), (5, 6), (9, 9))
    drafts = Drafts(asking, earlier, 4, torch.device("cpu"))
    assert count_texts(asking, earlier) == len(drafts.tokens_NC) == 6
    taken = (drafts.tokens_NC, drafts.length_N, drafts.sources_NS, drafts.prompt_N)
    assert sum(tensor.nbytes for tensor in taken) <= draft_bytes(6, 2 + 4)
    assert drafts.sources_NS.tolist() == [[4, 1, 5, 0], [5, 0, 4, 1], [2, -1, -1, -1], [-1] * 4]
    assert [drafts.tokens_NC[text, : drafts.length_N[text]].tolist() for text in (4, 5)] == [
        [5, 6, 1, 2],
        [5, 6, 3],
    ]
    place_B = torch.tensor([0, 1])
    assert drafts.find(place_B, 3).tolist() == [[1, 2, -1], [3, -1, -1]]
    # A sibling that has gone on is a source at once.
    drafts.write(
        place_B, torch.tensor([[8, 9], [8, 2]]), torch.tensor([[0, 1]] * 2),
        torch.tensor([[True, True], [True, False]]),
    )  # fmt: skip
    assert drafts.length_N[:2].tolist() == [4, 3]
    assert drafts.find(place_B, 2)[1].tolist() == [9, -1]
    drafts.start(place_B[:1])
    assert drafts.length_N[:2].tolist() == [2, 3]
    assert draft_bytes(4, 7) >= drafts.tokens_NC[:4].nbytes + drafts.length_N[:4].nbytes


def test_the_last_answers_stand_in_the_stead_of_earlier_ones() -> None:
    earlier = Answers()
    earlier.remember(draws((5,)), {0: sample(1)})
    earlier.remember(draws((6,)), {0: sample(2)})
    earlier.remember(draws((5,)), {0: sample(3)})
    kept = {ids: [answer.tolist() for _, answer in found] for ids, found in earlier.last.items()}
    assert kept == {(5,): [[3]], (6,): [[2]]}


def test_the_answers_to_the_prompts_asked_least_recently_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speculation, "REMEMBERED", 3 * (speculation.ANSWER_OVERHEAD + 8 + 1))
    earlier = Answers()
    for token in (5, 6, 7, 5, 8):
        earlier.remember(draws((token,)), {0: sample(1)})
        assert earlier.tokens <= speculation.REMEMBERED
    assert list(earlier.last) == [(7,), (5,), (8,)]
    earlier.remember(draws((9,)), {0: torch.zeros(10_000, dtype=torch.int64)})  # too long by itself
    assert not earlier.last and earlier.tokens == 0


def paced(device: str, emitted: int, right: int, setting: Setting = "auto") -> Pace:
    """After 1,000 rows found drafts, of which so many of up to 10,000 were right."""
    pace = Pace(setting, device)
    pace.count(emitted, 1_000, 1_000, 1_000, right, min(10_000, right + 1_000))
    return pace


def test_the_more_rows_and_the_fewer_drafts_hold_the_fewer_there_are() -> None:
    for device in ("cpu", "cuda"):
        good, bad = paced(device, 10_000, 9_900), paced(device, 1_010, 10)
        assert good.tokens_per_pass == 10 and bad.tokens_per_pass == 1.01
        many = [good.queries(rows) for rows in (1, 4, 16, 64, 256)]
        assert many == sorted(many, reverse=True) and many[0] == 16
        assert {bad.queries(rows) for rows in (16, 64, 256)} == {1}
        assert Pace(False, device).queries(1) == 1
        assert Pace(7, device).queries(16) == 8
        assert all(q * good.queries(q) <= MOST_TOKENS[device] for q in (1, 16, 64, 256))
    # A number is the most: as many as fit into a pass.
    given = {rows: Pace(15, "cuda").queries(rows) for rows in (8, 16, 32, 64, 128, 256)}
    assert given == {8: 16, 16: 16, 32: 8, 64: 4, 128: 2, 256: 1}
    assert Pace(3, "cuda").queries(8) == Pace(3, "cuda").queries(64) == 4


def test_a_cpu_draws_few_rows_at_a_time_where_many_drafts_hold() -> None:
    good, bad = paced("cpu", 10_000, 9_900), paced("cpu", 1_010, 10)
    assert good.rows(10) == 10
    assert good.rows(2_000) * good.queries(good.rows(2_000)) <= MOST_TOKENS["cpu"]
    assert good.queries(good.rows(2_000)) > 1 and good.rows(2_000) >= MOST_TOKENS["cpu"] / 16
    assert bad.rows(2_000) > good.rows(2_000) and bad.queries(bad.rows(2_000)) == 1
    assert Pace("auto", "cpu").rows(2_000) <= FIRST_ROWS  # before anything was tried
    assert Pace(7, "cpu").rows(32) == 32
    for pace in (Pace(False, "cpu"), Pace(7, "cuda"), paced("cuda", 10_000, 9_900)):
        assert pace.rows(2_000) == 2_000


def test_the_cost_of_a_pass_is_what_the_passes_took() -> None:
    """Seconds that are a sum of the three parts, with noise and a few passes that had to wait."""
    generator, cost = torch.Generator().manual_seed(0), Cost("cpu")
    own, row, token = 3e-3, 1e-4, 2e-5

    def seconds(rows: int, tokens: int) -> float:
        return own + row * rows + token * tokens

    for number in range(200):
        rows = int(torch.randint(1, 200, (), generator=generator))
        tokens = rows * int(torch.randint(1, 9, (), generator=generator))
        noise = 1 + 0.1 * float(torch.rand((), generator=generator))
        cost.observe(rows, tokens, seconds(rows, tokens) * noise * (3 if number % 40 == 7 else 1))
    for rows, tokens in ((16, 64), (64, 256), (128, 1024), (160, 160)):
        assert cost(rows, tokens) == pytest.approx(seconds(rows, tokens), rel=0.2)
    assert (Cost("cpu").weights > 0).all() and (cost.weights > 0).all()


def test_auto_is_off_on_a_gpu() -> None:
    assert resolved("auto", "cuda") is False
    assert resolved(7, "cuda") == 7 and resolved("auto", "cpu") == "auto"


def test_what_was_counted_fades() -> None:
    pace = Pace("auto", "cpu")
    pace.count(100, 100, 100, 0, 0, 700)
    for _ in range(20):
        pace.begin()
    assert pace.right / pace.checked == pytest.approx(PRIOR_SHARE, rel=0.05)
    assert pace.found / pace.asked == pytest.approx(PRIOR_SHARE, rel=0.05)
    assert pace.tokens_per_pass == 0
