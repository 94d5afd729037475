"""Rows in pages, on a CPU with the code that a GPU runs: small pages and `decode_attention`'s
PyTorch path instead of whole slots and batched products, and steps that are queued ahead."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rollouts import answer, equal_bits, ragged, same_tokens, tiny
from torch import Tensor

from sodfast.model.language_model import LanguageModel
from sodfast.rollout import batch
from sodfast.rollout.batch import Batch
from sodfast.rollout.cache import PAGE, SCRATCH, Cache
from sodfast.rollout.decoder import Decoder
from sodfast.rollout.engine import Sample
from sodfast.rollout.native import NativeEngine
from sodfast.rollout.passes import Passes

POSITIONS = 16
CAP = 60
PROMPTS = [prompt for prompt in ragged(5, longest=40) for _ in range(4)]


def set_look(patch: pytest.MonkeyPatch, steps: int, queued: int) -> None:
    patch.setitem(batch.STEPS_PER_LOOK, "cpu", steps)
    patch.setitem(batch.QUEUED_LOOKS, "cpu", queued)


@pytest.fixture
def in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, pages aside, which have 64 positions there."""
    monkeypatch.setitem(PAGE, "cpu", POSITIONS)
    set_look(monkeypatch, 8, 2)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def whole(model: LanguageModel) -> list[Sample]:
    """The answers in whole slots."""
    return answer(NativeEngine(model, 64), PROMPTS, CAP)


def budget(model: LanguageModel, pages: int) -> float:
    """GiB of so many pages."""
    return (pages + 0.5) * POSITIONS * Cache.bytes_per_token(model.network) / 2**30


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Any]]]:
    """Places given up; the most rows that were alive; and after every look the books are checked:
    every page is free or held, by as many rows as it is counted for."""
    found: dict[str, list[Any]] = {"given up": [], "alive": []}
    give_up, advance = Batch._give_up_youngest, Batch.advance

    def noting(self: Batch) -> None:
        places = [draw.place for draw in self.rows if draw is not None]
        give_up(self)
        assert self.waiting[-1].place == max(places)
        found["given up"].append(max(places))

    def checking(self: Batch) -> Any:
        finished = advance(self)
        found["alive"].append(self.alive)
        if not self.cache.whole:
            held = [page for pages in self.cache.held for page in pages]
            counts = {page: held.count(page) for page in held}
            assert SCRATCH not in counts and len(set(self.cache.free)) == len(self.cache.free)
            assert counts == {p: n for p, n in enumerate(self.cache.holders) if n}
            pages = {SCRATCH, *counts, *self.cache.free}
            assert sorted(pages) == list(range(len(self.cache.holders)))
            assert len(pages) == 1 + len(counts) + len(self.cache.free)
        return finished

    monkeypatch.setattr(Batch, "_give_up_youngest", noting)
    monkeypatch.setattr(Batch, "advance", checking)
    yield found


@pytest.mark.parametrize(
    "name", ["qwen3", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mistral-window",))]
)
def test_pages_answer_as_whole_slots_do(
    name: str, events: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens; the order of sums differs, so log-probs agree to rounding."""
    model = tiny(name)
    expected = answer(NativeEngine(model, 64), PROMPTS, CAP)
    monkeypatch.setitem(PAGE, "cpu", POSITIONS)
    found = answer(NativeEngine(model, 64), PROMPTS, CAP)
    assert same_tokens(found, expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.logprob, b.logprob, rtol=0, atol=1e-4)
        torch.testing.assert_close(a.entropy, b.entropy, rtol=0, atol=1e-4)
    assert not events["given up"]


@pytest.mark.slow
def test_when_pages_run_out_the_youngest_waits_and_is_answered_with_the_same_bits(
    model: LanguageModel, in_pages: None, events: dict[str, list[Any]]
) -> None:
    """Down to the pages of one sequence of full length, which are the least that runs."""
    enough = answer(NativeEngine(model, 64), PROMPTS, CAP)
    assert not events["given up"] and max(events["alive"]) == len(PROMPTS)
    longest = -(-(max(map(len, PROMPTS)) + CAP) // POSITIONS)
    for pages in (1 + longest, 16):
        events["given up"].clear()
        events["alive"].clear()
        engine = NativeEngine(model, 64, cache_gib=budget(model, pages))
        assert engine.size(max(map(len, PROMPTS)) + CAP, len(PROMPTS)).pages == pages
        assert equal_bits(answer(engine, PROMPTS, CAP), enough)
        assert 0 < len(events["given up"]) <= len(PROMPTS)  # about once each: no thrashing
        assert max(events["alive"]) > 1  # and not one after the other, for fear of it


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "queued"), [(3, 3), (8, 1), (8, 2)])
def test_queueing_ahead_changes_no_bit(
    steps: int,
    queued: int,
    model: LanguageModel,
    whole: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows that ended while more was queued for them; refills, too."""
    set_look(monkeypatch, steps, queued)
    for rows in (64, 5):
        assert equal_bits(answer(NativeEngine(model, rows), PROMPTS, CAP), whole)


@pytest.mark.slow
def test_tokens_behind_a_stop_string_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host sees the string up to 16 tokens late, as where it sees it at once."""

    class Letters(LanguageModel):
        def decode(self, ids: Tensor) -> str:
            return "".join(chr(48 + int(i)) for i in ids)

    inner = tiny("qwen3")
    model = Letters(inner.network, None, inner.eos_ids, inner.pad_id)
    options = {"stop": ("A", "Z")}  # tokens 17 and 42
    expected = answer(NativeEngine(model, 64), PROMPTS, CAP, **options)
    stopped = [one for one in expected if int(one.response[-1]) in (17, 42)]
    assert len(stopped) > 4 and not any(one.capped for one in stopped)
    set_look(monkeypatch, 8, 2)
    assert equal_bits(answer(NativeEngine(model, 6), PROMPTS, CAP, **options), expected)
    monkeypatch.setitem(PAGE, "cpu", POSITIONS)
    tight = NativeEngine(model, 64, cache_gib=budget(model, 16))
    assert same_tokens(answer(tight, PROMPTS, CAP, **options), expected)


def test_the_samples_of_a_prompt_share_its_full_pages(
    model: LanguageModel, in_pages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[list[int]] = []
    start = Cache.start

    def noting(self: Cache, rows: range, tokens: int) -> None:
        start(self, rows, tokens)
        held.extend(self.held[row][:] for row in rows)

    monkeypatch.setattr(Cache, "start", noting)
    (prompt,) = (p for p in ragged(1, longest=60))
    prompt = torch.cat([prompt, prompt.new_full((37 - len(prompt) % 37,), 5)])[:37]
    answer(NativeEngine(model, 64), [prompt] * 4, 3)
    assert len({tuple(pages[:2]) for pages in held}) == 1  # positions 0 … 31
    assert len({pages[2] for pages in held}) == 4 and {len(pages) for pages in held} == {3}


def test_rows_that_are_done_see_nothing_and_write_to_the_page_of_nobody(
    model: LanguageModel,
) -> None:
    """Their pages may have gone to others: their entries of the table are not followed."""
    decoder = Decoder(model.network, 32)
    cache = Cache(decoder, 3, 32, page=POSITIONS, pages=6)
    cache.start([0, 1, 2], 20)
    cache.upload()
    cached_B = torch.tensor([20, 31, 20], dtype=torch.int32)
    attend: Any = cache.decoding(cached_B, torch.tensor([[False], [True], [False]]), 32)
    place = attend.place(0)
    assert attend.used_B.tolist() == [21, 0, 21]
    assert place.page_T.tolist() == [cache.held[0][1], SCRATCH, cache.held[2][1]]
    assert place.offset_T.tolist() == [4, 15, 4]
    cache.memory.fill_(torch.nan)
    for cached in (place.keys, place.values):
        cached[cache.held[0] + cache.held[2]] = 1.0
    query = torch.randn(3, decoder.query_heads, decoder.head_dim)
    attended = attend(0, query, None, None)
    assert not attended[1].any() and attended.isfinite().all()


def test_no_step_is_queued_behind_the_caps(
    model: LanguageModel, in_pages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All answers end at the cap: 17 tokens are one of the prefill and two looks of steps."""
    steps: list[int] = []
    step: Callable[..., None] = Passes.step
    monkeypatch.setattr(Passes, "step", lambda self, *a: (steps.append(1), step(self, *a))[1])
    endless = LanguageModel(model.network, None, (-1,), model.pad_id)
    answer(NativeEngine(endless, 8), PROMPTS[:8], 17)
    assert len(steps) == 16


@pytest.mark.slow
def test_idle_rows_of_a_model_with_a_window_leave_nothing_behind() -> None:
    """A row that ended far behind the others would see no position within their width; what it
    wrote then was NaN, which the next sample of its slot met."""
    model = tiny("mistral-window")
    prompts = [prompt for prompt in ragged(12) for _ in range(4)]
    together = answer(NativeEngine(model, 64), prompts, CAP)
    assert equal_bits(answer(NativeEngine(model, 10), prompts, CAP), together)
