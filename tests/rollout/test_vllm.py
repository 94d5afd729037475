"""The vLLM engine around a stand-in for vLLM: weights, keys, stops, log-probs and refusals.

What only a GPU can show, vLLM itself, is not tested here.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import stand_in_vllm
import torch
from marks import slow
from stand_in_vllm import LLM, Network
from torch import Tensor

from sodfast.config import ObjectiveConfig, RolloutConfig
from sodfast.errors import RunFailed, UsageError
from sodfast.model.language_model import LanguageModel, to_ids
from sodfast.model.packing import own_attention
from sodfast.objective import micro_batch_loss, truncated_importance_weight
from sodfast.rollout import vllm as vllm_engine
from sodfast.rollout.build import build_engine
from sodfast.rollout.engine import Sample, SampleKey, Sampling
from sodfast.rollout.hf import HFEngine
from sodfast.rollout.vllm import VLLMEngine, sample_seed
from sodfast.trainer import Trainer

PROMPTS = ["17*8+6=", "2*2+1=", "9*9", "11*7+3="]
CONFIG = RolloutConfig(max_prompt_tokens=20, max_new_tokens=12, engine="vllm")
Build = Callable[..., VLLMEngine]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    monkeypatch.setitem(sys.modules, "vllm", stand_in_vllm.module())
    monkeypatch.setattr(vllm_engine, "DEVICES", ("cpu",))
    monkeypatch.setattr(vllm_engine, "_free_share", lambda device: 0.5)
    return LLM


@pytest.fixture
def engine(stand_in: type[LLM], model: LanguageModel) -> VLLMEngine:
    return VLLMEngine(model, CONFIG)


def ask(engine: Any, model: LanguageModel, step: int = 1, **sampling: Any) -> list[Sample]:
    prompts = [to_ids(model.encode(prompt)) for prompt in PROMPTS]
    wanted = Sampling(**{"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12, **sampling})
    return engine.generate(prompts, range(len(prompts)), wanted, SampleKey(7, step))


def disturb(model: LanguageModel) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


# ---------------------------------------------------------------- weights


def test_greedy_answers_follow_the_students_current_weights(
    engine: VLLMEngine, model: LanguageModel
) -> None:
    answers = []
    for change in (lambda model: None, disturb, disturb):
        change(model)
        ours = ask(engine, model, temperature=0.0)
        for one, expected in zip(
            ours, ask(HFEngine(model, 8), model, temperature=0.0), strict=True
        ):
            assert one.response.equal(expected.response) and one.capped == expected.capped
            torch.testing.assert_close(one.logprob, expected.logprob, rtol=0, atol=1e-5)
            torch.testing.assert_close(one.entropy, expected.entropy, rtol=0, atol=1e-5)
        answers.append([one.response.tolist() for one in ours])
    assert all(before != after for before, after in pairwise(answers))


def test_it_sleeps_between_calls_and_wakes_in_order(
    engine: VLLMEngine, model: LanguageModel
) -> None:
    llm = LLM.newest
    assert llm.calls == ["apply", "sleep 2"] and not llm.awake
    llm.calls.clear()
    ask(engine, model)
    assert llm.calls == [
        "wake ['weights']", "apply", "wake ['kv_cache']", "reset", "generate", "sleep 2",
    ]  # fmt: skip


def test_it_sleeps_after_a_failure_too(
    engine: VLLMEngine, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "generate", fail)
    with pytest.raises(KeyboardInterrupt):
        ask(engine, model)
    assert LLM.newest.calls[-1] == "sleep 2"


@pytest.mark.parametrize("lost", ["embed_tokens", "layers.1.self_attn.k_proj", "model.norm"])
def test_a_weight_that_is_not_copied_fails_the_run(
    engine: VLLMEngine, model: LanguageModel, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    load = Network.load_weights

    def load_some(self: Network, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return load(self, ((name, value) for name, value in weights if lost not in name))

    monkeypatch.setattr(Network, "load_weights", load_some)
    name = lost.replace("k_proj", "qkv_proj")
    with pytest.raises(RunFailed, match=rf"not the student's.*: 1 parameters differ.*{name}"):
        ask(engine, model)
    assert not LLM.newest.awake


def test_a_last_bit_is_a_difference(engine: VLLMEngine, model: LanguageModel) -> None:
    network, student = LLM.newest.network, dict(model.network.named_parameters())
    network.load_weights(student.items())
    assert vllm_engine.different_parameters(network, student) == []
    name = "model.layers.0.mlp.gate_up_proj.weight"
    last = network.tensors[name].data[-1]
    last[-1] = torch.nextafter(last[-1], torch.tensor(torch.inf))
    assert vllm_engine.different_parameters(network, student) == [name]


def test_a_parameter_with_a_name_of_its_own_is_refused_when_built(
    stand_in: type[LLM], model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(Network):
        def __init__(self, config: Any, dtype: torch.dtype) -> None:
            super().__init__(config, dtype)
            self.tensors["model.extra"] = torch.nn.Parameter(torch.ones(2))

    monkeypatch.setattr(LLM, "network_class", Other)
    with pytest.raises(UsageError, match=r"cannot run this model.*model\.extra"):
        VLLMEngine(model, CONFIG)


def test_a_cache_that_is_not_reset_fails_the_run(
    engine: VLLMEngine, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LLM, "reset_prefix_cache", lambda self: False)
    with pytest.raises(RunFailed, match="prefix cache"):
        ask(engine, model)


# ---------------------------------------------------------------- sampling


def test_samples_are_functions_of_their_key(engine: VLLMEngine, model: LanguageModel) -> None:
    def tokens(step: int) -> list[list[int]]:
        return [one.response.tolist() for one in ask(engine, model, step, temperature=2.0)]

    assert tokens(1) == tokens(1) != tokens(2)


def test_seeds_are_distinct_and_fit_a_signed_word() -> None:
    keys = [
        (seed, step, sample) for seed in (0, 1, 2**64 - 1) for step in (0, 1) for sample in (0, 1)
    ]
    seeds = [sample_seed(SampleKey(seed, step), sample) for seed, step, sample in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [sample_seed(SampleKey(seed, step), sample) for seed, step, sample in keys]


def test_the_parameters_of_a_request(engine: VLLMEngine, model: LanguageModel) -> None:
    ask(engine, model, temperature=0.5, top_p=0.9, top_k=3, max_new_tokens=5)
    for number, params in enumerate(LLM.newest.params):
        assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 3)
        assert params.max_tokens == 5 and params.logprobs == 0 and params.ignore_eos
        assert params.stop_token_ids == list(model.eos_ids)
        assert params.seed == sample_seed(SampleKey(7, 1), number)
        assert params.stop == [] and not params.detokenize
    ask(engine, model)
    assert {params.top_k for params in LLM.newest.params} == {0}


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_the_students_and_vllms_are_kept(
    engine: VLLMEngine, model: LanguageModel, temperature: float
) -> None:
    for one in ask(engine, model, temperature=temperature):
        ids = torch.cat([one.prompt, one.response])
        with torch.no_grad(), own_attention(model.network):
            logits_LV = model.network(ids[None]).logits[0, len(one.prompt) - 1 : -1].double()
        logprob_LV = torch.log_softmax(logits_LV / temperature, -1)
        expected = logprob_LV.gather(1, one.response[:, None])[:, 0].float()
        entropy = torch.special.entr(logprob_LV.exp()).sum(1).float()
        assert isinstance(one, Sample)
        torch.testing.assert_close(one.logprob, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.sampler_logprob, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.entropy, entropy, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({"temperature": 0.6}, "processed_logprobs"),
        ({"top_p": 0.9}, "raw_logprobs"),
        *slow(({}, "processed_logprobs"), ({"top_k": 5}, "raw_logprobs")),
    ],
)
def test_rollouts_have_vllms_untruncated_logprob(
    stand_in: type[LLM], model: LanguageModel, settings: dict[str, Any], mode: str
) -> None:
    engine = VLLMEngine(model, CONFIG.model_copy(update=settings))
    assert LLM.newest.arguments["logprobs_mode"] == mode
    for one in ask(engine, model, **settings):
        assert isinstance(one, Sample)
        torch.testing.assert_close(one.sampler_logprob, one.logprob, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 5}])
def test_a_logprob_that_vllm_cannot_return_is_refused(
    stand_in: type[LLM], model: LanguageModel, settings: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=r"rollout\.temperature=0\.6"):
        VLLMEngine(model, CONFIG.model_copy(update={"temperature": 0.6, **settings}))


def test_an_evaluation_that_truncates_has_the_students_logprob_only(
    engine: VLLMEngine, model: LanguageModel
) -> None:
    """The truncated log-prob of vLLM would look like a mismatch."""
    samples = ask(engine, model, temperature=0.6, top_p=0.95)
    assert all(type(one) is Sample and one.behavior_logprob is one.logprob for one in samples)


def test_a_stop_string_ends_with_the_token_that_completes_it(
    engine: VLLMEngine, model: LanguageModel
) -> None:
    ours = ask(engine, model, temperature=0.0, stop=("+6", "="))
    expected = ask(HFEngine(model, 8), model, temperature=0.0, stop=("+6", "="))
    assert all(params.detokenize for params in LLM.newest.params)
    for one, other in zip(ours, expected, strict=True):
        assert one.response.equal(other.response) and one.capped == other.capped
        assert len(one.logprob) == len(one.entropy) == len(one.response)
    assert any(model.decode(one.response).endswith(("+6", "=")) for one in ours)


def test_capped_means_ended_by_the_cap(engine: VLLMEngine, model: LanguageModel) -> None:
    full = ask(engine, model, temperature=0.0)
    length = len(full[0].response)
    assert not full[0].capped and full[0].response[-1] in model.eos_ids
    assert not ask(engine, model, temperature=0.0, max_new_tokens=length)[0].capped
    assert ask(engine, model, temperature=0.0, max_new_tokens=length - 1)[0].capped


# ---------------------------------------------------------------- building and refusing


def test_what_vllm_is_built_with(stand_in: type[LLM], model: LanguageModel) -> None:
    VLLMEngine(model, CONFIG.model_copy(update={"cache_gib": 1.5, "batch_size": 32}))
    found = dict(LLM.newest.arguments)
    del found["model"]
    assert found == {
        "dtype": "float32",
        "seed": 0,
        "gpu_memory_utilization": 0.5 * vllm_engine.MEMORY_SHARE,
        "enforce_eager": False,
        "kv_cache_memory_bytes": 3 * 2**29,
        "load_format": "dummy",
        "max_model_len": 32,
        "max_num_seqs": 32,
        "enable_prefix_caching": True,
        "enable_sleep_mode": True,
        "logprobs_mode": "processed_logprobs",
    }


def test_a_missing_vllm_is_one_line(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match=r"pip install 'sodfast\[vllm\]'") as error:
        build_engine(CONFIG, model, print)
    assert "\n" not in str(error.value)


def test_a_package_that_vllm_misses_is_not_called_a_missing_vllm(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "vllm.py").write_text("import a_package_that_vllm_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_vllm_needs"):
        VLLMEngine(model, CONFIG)


def test_a_cpu_is_refused(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", stand_in_vllm.module())
    with pytest.raises(UsageError, match="needs a GPU"):
        VLLMEngine(model, CONFIG)


def test_what_vllm_refuses_is_a_usage_error(
    model: LanguageModel, stand_in: type[LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: LLM, *args: Any, **kwargs: Any) -> None:
        raise ValueError("To serve at least one request,\n1.5 GiB KV cache is needed")

    monkeypatch.setattr(LLM, "__init__", refuse)
    with pytest.raises(UsageError, match=r"cannot run this model: To serve .* 1\.5 GiB"):
        VLLMEngine(model, CONFIG)


def test_sequences_that_do_not_fit_are_refused(engine: VLLMEngine, model: LanguageModel) -> None:
    engine.require(32)
    with pytest.raises(UsageError, match="33 tokens exceeds the 32"):
        engine.require(33)
    with pytest.raises(UsageError, match="exceeds the 32"):
        ask(engine, model, max_new_tokens=30)
    sampling = Sampling(1.0, 1.0, 4)
    with pytest.raises(ValueError, match="no tokens"):
        engine.generate([to_ids([])], [0], sampling, SampleKey(0, 1))
    with pytest.raises(UsageError, match=r"at least 0\.01"):
        ask(engine, model, temperature=0.001)


def test_running_out_of_memory_says_what_to_lower(
    engine: VLLMEngine, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: LLM, tags: Sequence[str] | None = None) -> None:
        raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:139")

    monkeypatch.setattr(LLM, "wake_up", fail)
    with pytest.raises(RunFailed, match=r"lower rollout\.cache_gib"):
        ask(engine, model)


def test_logits_that_are_not_finite_fail_the_run(engine: VLLMEngine, model: LanguageModel) -> None:
    with torch.no_grad():
        model.network.base_model.norm.weight[3] = torch.inf
    with pytest.raises(RunFailed, match="not finite"):
        ask(engine, model, temperature=0.0)


# ---------------------------------------------------------------- the mismatch in training


def foreign(ratios: Sequence[float]) -> Sample:
    logprob = torch.full((len(ratios),), -40.0)
    return Sample(
        prompt=to_ids([1]),
        response=to_ids([2] * len(ratios)),
        logprob=logprob,
        entropy=torch.zeros_like(logprob),
        capped=False,
        sampler_logprob=logprob - torch.tensor(ratios).log(),
    )


def test_the_mismatch_is_capped_and_one_for_our_own_samples() -> None:
    sample = foreign([0.25, 1.0, 1.5, 2.5, 1e12, 1e-12])
    own = Sample(sample.prompt, sample.response, sample.logprob, sample.entropy, False)
    expected = [0.25, 1.0, 1.5, 2.0, 2.0, 2.0611536e-9, *[1.0] * 6]  # e^-20 is the least
    assert truncated_importance_weight([sample, own]).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weights", [(0.5, 0.0, 0.0), (0.0, 0.25, -1.0), (0.5, 0.25, 2.0)])
def test_the_mismatch_multiplies_both_terms(weights: tuple[float, float, float]) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 8), torch.randn(3, 8)
    head = torch.randn(11, 8)

    def losses(sample: Sample) -> Tensor:
        """Loss of the sample cut to its first 1, 2, 3 tokens."""
        parts = []
        for length in (1, 2, 3):
            fields = {
                name: value[:length] if name != "prompt" and isinstance(value, Tensor) else value
                for name, value in vars(sample).items()
            }
            output = micro_batch_loss(
                ObjectiveConfig(ratio_cap=None), 1.0, None, student[:length], head,
                [teacher[:length]], head, [type(sample)(**fields)], [weights],
            )  # fmt: skip
            parts.append(output.loss)
        return torch.stack(parts).diff(prepend=torch.zeros(1))

    sample = foreign([0.5, 1.0, 8.0])
    own = Sample(sample.prompt, sample.response, sample.logprob, sample.entropy, False)
    ratio = losses(sample) / losses(own)
    torch.testing.assert_close(ratio, torch.tensor([0.5, 1.0, 2.0]), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_a_run_logs_the_mismatch(
    stand_in: type[LLM],
    build: Callable[..., Trainer],
    read_run: Callable[[Path], Any],
    tmp_path: Path,
) -> None:
    trainer = build(
        tmp_path / "run", "rollout.engine=vllm", "steps=2", "eval.every=2",
        "optimizer.updates_per_step=2",
    )  # fmt: skip
    try:
        assert trainer.train() == "done"
    finally:
        trainer.run.close()
    for line in read_run(tmp_path / "run").lines[1:]:
        assert line["policy/sampler_ratio_min"] == pytest.approx(1, abs=1e-4)
        assert line["policy/sampler_ratio_max"] == pytest.approx(1, abs=1e-4)
        assert line["policy/sampler_ratio_mean"] == pytest.approx(1, abs=1e-4)
        assert line["policy/entropy"] > 0


@pytest.mark.slow
def test_a_sampler_with_other_weights_shows_in_the_logged_ratio(
    stand_in: type[LLM],
    build: Callable[..., Trainer],
    read_run: Callable[[Path], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = LLM._draw

    def flatter(self: LLM, logits_V: Tensor, *others: Any) -> tuple[int, float]:
        return draw(self, logits_V * 0.9, *others)

    monkeypatch.setattr(LLM, "_draw", flatter)
    trainer = build(tmp_path / "run", "rollout.engine=vllm", "steps=1", "eval.every=1")
    try:
        trainer.train()
    finally:
        trainer.run.close()
    line = read_run(tmp_path / "run").lines[-1]
    assert line["policy/sampler_ratio_min"] < 0.98 < 1.01 < line["policy/sampler_ratio_max"]
    assert line["policy/sampler_ratio_min"] < line["policy/sampler_ratio_mean"]
    assert line["policy/sampler_ratio_mean"] < line["policy/sampler_ratio_max"]
