"""Passes over rows, without the batch that says which rows there are."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rollouts import answer, ragged, tiny
from torch._subclasses.fake_tensor import FakeTensorMode

from sodfast.memory.trace import _no_kernels
from sodfast.model.language_model import LanguageModel
from sodfast.rollout.admission import Draw
from sodfast.rollout.cache import Cache
from sodfast.rollout.decoder import Decoder
from sodfast.rollout.engine import Sample, SampleKey, Sampling
from sodfast.rollout.native import NativeEngine
from sodfast.rollout.passes import CPU_ROWS, Passes, idle_rows, state_bytes

CAP = 9
WIDTH = 40
PROMPTS = ragged(3)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def answers(model: LanguageModel) -> list[Sample]:
    return answer(NativeEngine(model, 64), PROMPTS, CAP)


@pytest.fixture
def passes(model: LanguageModel) -> Iterator[Passes]:
    """The prompts in the first three of four rows, with their first tokens drawn."""
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=CAP)
    cache = Cache(Decoder(model.network, WIDTH), 4, WIDTH)
    found = Passes(model, cache, 4, sampling, SampleKey(2**63 + 11, 4), None)
    draws = [Draw(n, ids, n, tuple(ids.tolist())) for n, ids in enumerate(PROMPTS)]
    with torch.inference_mode():
        found.start(0, draws)
        for row, draw in enumerate(draws):
            cache.start([row], len(draw.ids))
        found.prefill([(draw.prompt, range(row, row + 1)) for row, draw in enumerate(draws)])
        yield found


def tokens(passes: Passes, row: int) -> list[int]:
    return passes.tokens[row, : int(passes.count[row])].tolist()


def test_passes_draw_the_engines_answers(passes: Passes, answers: list[Sample]) -> None:
    for _ in range(CAP):  # one more than there are tokens: what is done stays as it is
        passes.step(4, 1, WIDTH)
    assert passes.done.all()
    for row, expected in enumerate(answers):
        length = len(expected.response)
        assert tokens(passes, row) == expected.response.tolist()
        assert passes.logprob[row, :length].equal(expected.logprob)
        assert passes.entropy[row, :length].equal(expected.entropy)
    lengths = [len(expected.response) for expected in answers]
    assert passes.count.tolist() == [*lengths, 0]
    assert passes.passed[0] == sum(lengths) - 3  # the prefill's tokens are no pass's


def test_a_row_goes_on_where_it_was_moved_to(passes: Passes, answers: list[Sample]) -> None:
    passes.step(3, 1, WIDTH)
    passes.move([0], [3], WIDTH)
    passes.idle([0])
    passes.noise_ahead.clear()  # its rows have changed
    before = tokens(passes, 0)
    for _ in range(CAP):
        passes.step(4, 1, WIDTH)
    assert tokens(passes, 3) == answers[0].response.tolist()
    assert tokens(passes, 0) == before


def test_a_cap_of_its_own_ends_a_row(passes: Passes, answers: list[Sample]) -> None:
    row = max(range(3), key=lambda n: len(answers[n].response))
    assert len(answers[row].response) > 3
    passes.cap[row] = 3
    for _ in range(CAP):
        passes.step(4, 1, WIDTH)
    assert tokens(passes, row) == answers[row].response[:3].tolist()


def test_a_cpu_runs_the_tokens_that_count(passes: Passes) -> None:
    passes.step(4, 1, WIDTH)
    assert passes.ran == CPU_ROWS  # three rows, and repetitions up to a multiple
    assert [idle_rows(n, False) for n in (1, CPU_ROWS, CPU_ROWS + 1)] == [15, 0, 15]
    assert idle_rows(5, True) == 0


def test_the_plan_counts_the_state_of_a_row(passes: Passes) -> None:
    state = (
        *(passes.token, passes.cached, passes.count, passes.cap, passes.sample, passes.place),
        *(passes.done, passes.tokens, passes.logprob, passes.entropy),
    )
    held = sum(tensor.numel() * tensor.element_size() for tensor in state)
    assert held == pytest.approx(state_bytes(4, CAP), rel=0.05)


def test_what_the_host_looks_at(passes: Passes) -> None:
    status = passes.status(4)
    assert status[:4].tolist() == [*passes.done[:3].long().tolist(), 1]
    assert status[4:8].equal(passes.count) and status[8:].equal(passes.passed)
    assert status.dtype == torch.int64


@pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="needs a torch that is built with CUDA"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_pass_reads_nothing_on_the_host(
    dtype: torch.dtype, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA tensors without memory, which refuse to say what they hold: a prefill, and the step
    that a graph captures, with every call of torch that a GPU would see. Kernels are not launched.
    """
    pytest.importorskip("triton")
    from transformers import AutoModelForCausalLM

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, lambda index: index)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(multi_processor_count=132),
    )
    for module in ("cache", "passes"):
        monkeypatch.setattr(f"sodfast.rollout.{module}.staged", lambda tensor, device: tensor)
    sampling = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=CAP)
    draws = [Draw(n, ids, n, tuple(ids.tolist())) for n, ids in enumerate(PROMPTS)]
    gpu = torch.device("cuda", 0)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _no_kernels():
        with gpu:
            network: Any = AutoModelForCausalLM.from_config(model.network.config, dtype=dtype)
        fake = replace(model, network=network)
        assert fake.device == gpu
        cache = Cache(Decoder(network, 64), 4, 64, None, 64, 9)
        found = Passes(fake, cache, 4, sampling, SampleKey(1, 4), None)
        found.start(0, draws)
        for row, draw in enumerate(draws):
            cache.start([row], len(draw.ids))
        found.prefill([(draw.prompt, range(row, row + 1)) for row, draw in enumerate(draws)])
        found.step(4, 1, 64)
        state = [*found.advancing(), found.tokens, found.logprob, found.status(4)]
    assert {tensor.device for tensor in state} == {gpu}
