"""The rollout bench's own logic, GPU parts included, at tiny shapes on a CPU: what it compares is
comparable, its byte count is right, and its checks can fail."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

CPU = torch.device("cpu")
RIVALS = ("generate", "continuous batching")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
    import bench_rollout

    return bench_rollout


@pytest.fixture(scope="module")
def model(bench: Any) -> Any:
    return bench.build(bench.TINY_SHAPE, CPU, torch.float32, 0.02)


def test_qwen3_8b_has_its_number_of_parameters(bench: Any) -> None:
    model = bench.build(bench.Shape(), torch.device("meta"), torch.bfloat16, 0.02)
    assert model.network.num_parameters() == 8_190_735_360
    assert model.network.dtype == torch.bfloat16


def test_a_layer_decodes_with_four_products_as_that_of_a_loaded_model(model: Any) -> None:
    """Weights apart would be measured as seven."""
    from sodfast.rollout.decoder import Decoder

    for layer in Decoder(model.network, 8).layers:
        for product in (layer.qkv, layer.output, layer.gate_up, layer.down):
            assert product.weight is not None


@pytest.mark.slow
def test_the_tail_is_geometric_and_every_rival_answers_at_the_same_lengths(bench: Any) -> None:
    """The rivals assert their lengths themselves; one that differed would be listed as failed."""
    shape = bench.Shape(16, 16, 1, 2, 1, 8, 8, 128)
    found = bench.long_tail(rounds=1, count=64, shape=shape)
    assert 4 < found["mean_length"] < 16  # of mean 8: five standard errors
    for name in (*RIVALS, "hf"):
        assert "failed" not in found["cases"][name], name
        assert found["cases"][name]["ours_is_faster"] > 0


def test_a_page_of_the_rivals_cache_is_as_large_as_the_bench_takes_it_to_be(bench: Any) -> None:
    """The option that sets it is `block_size` in transformers 5.17 and `page_size` in 5.23, so the
    bench sets neither."""
    from transformers.generation import ContinuousBatchingConfig

    config = ContinuousBatchingConfig()
    name = "page_size" if hasattr(config, "page_size") else "block_size"
    assert getattr(config, name) == bench.RIVAL_PAGE


def test_the_bytes_of_a_decode_step(bench: Any, model: Any) -> None:
    row = bench.decode_step(model, slots=4, context=40, steps=8, rates={"copy": 1e9, "read": 2e9})
    weights = model.network.num_parameters() - model.head.numel()  # the embedding's rows, untied
    # 36 tokens of prompt and one before the measurement: 36 + 1 cached, then 1 … 8 more are read.
    assert row["positions"] == 37 + 4.5
    assert row["bytes"] == 4 * weights + 4 * 41.5 * (2 * 2 * 2 * 32 * 4)
    share = row["bytes"] / 2e9 / (row["milliseconds"] / 1e3)
    assert row["share_of_roofline"] == pytest.approx(share)
    assert row["tokens_per_second"] == pytest.approx(4e3 / row["milliseconds"])


def test_the_bytes_of_one_layers_attention(bench: Any) -> None:
    row = bench.attention_step(CPU, slots=3, context=40, layers=2, shape=bench.TINY_SHAPE)
    assert row["bytes"] == 3 * 40 * 2 * 2 * 32 * 4  # keys and values of two heads of 32, fp32
    assert row["bytes_per_second"] == pytest.approx(row["bytes"] / (row["milliseconds"] / 1e3))


@pytest.mark.slow
def test_whole_answers_have_the_length_that_was_asked_for(bench: Any, model: Any) -> None:
    rows = bench.whole_answers(model, slots=3, prompt=5, tokens=7, rounds=1)
    for name in ("native", *RIVALS):
        row = rows[name]
        assert row["seconds"] * row["tokens_per_second"] == pytest.approx(3 * 7)


@pytest.mark.slow
def test_the_correctness_checks_hold_on_a_cpu(bench: Any) -> None:
    rows = bench.check_equality(CPU) + bench.check_repeatability(CPU, torch.float32)
    assert [row["met"] for row in rows] == [True] * 4, rows


@pytest.mark.slow
def test_a_sampler_that_looks_at_its_batch_is_found(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sloppy(bench.NativeEngine):  # type: ignore[misc]
        def generate(self, prompts: Any, samples: Sequence[int], *others: Any) -> Any:
            return super().generate(prompts, range(len(prompts)), *others)

    monkeypatch.setattr(bench, "NativeEngine", Sloppy)
    again, company = bench.check_repeatability(CPU, torch.float32)
    assert again["met"] and not company["met"]


def test_a_rivals_fault_is_its_result_and_ours_is_an_error(bench: Any) -> None:
    def fail(turn: int) -> tuple[float, int]:
        raise RuntimeError("out of blocks")

    rows = bench.take_turns({"native": lambda turn: (2.0, 10), "rival": fail}, rounds=3)
    assert rows["rival"] == {"failed": "RuntimeError: out of blocks"}
    assert rows["native"] == {"seconds": 2.0, "tokens_per_second": 5.0}
    with pytest.raises(RuntimeError, match="out of blocks"):
        bench.take_turns({"native": fail}, rounds=1)


def test_targets_are_met_or_missed(bench: Any) -> None:
    assert bench.target("share", 0.7, 0.7)["met"] and not bench.target("share", 0.69, 0.7)["met"]
    assert bench.target("bytes", 1, 2, at_most=True)["met"]
    assert not bench.target("bytes", 3, 2, at_most=True)["met"]
