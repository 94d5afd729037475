"""`sodfast plan`: what fits, how large a micro-batch may be, and what would make a run fit."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from marks import slow

from sodfast.config import Config, load_config, override
from sodfast.memory.estimate import GIB, Estimate
from sodfast.memory.plan import changes, largest_micro_batch
from sodfast.parallel.offload import pinned_setting


def last_line(out: str) -> Any:
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_the_8b_preset_fits_as_the_byte_budget_says(cli: Command) -> None:
    outcome = cli("plan", "qwen3_8b_80gb", "model.kept_layers=0")
    result = last_line(outcome.out)
    assert (outcome.code, outcome.err, result["fits"]) == (0, "", True)
    assert "Layers that keep their activations: 0 of 36 (model.kept_layers)." in outcome.out
    assert result["parameters"] == 8_190_735_360
    assert result["budget_bytes"] == 78 * GIB >= max(result["peak_bytes"].values())
    assert result["peak_bytes"] == {p: sum(i.values()) for p, i in result["phases"].items()}
    gib = {item: size / GIB for item, size in result["phases"]["train"].items()}
    assert gib.pop("activations") == pytest.approx(12, rel=0.1)
    assert gib == pytest.approx(
        {
            "weights": 15.26,
            "workspaces": 2 / 32,
            "gradients": 15.26,
            "optimizer_state": 15.5,
            "teacher_hidden": 4.0,
            "teacher_head": 1.16,
        },
        rel=0.02,
    )
    assert result["peak_bytes"]["train"] / GIB == pytest.approx(63.2, rel=0.02)
    assert result["phases"]["teacher"]["teacher_stream"] == pytest.approx(3.6e9, rel=0.02)
    pinned = 16.4e9 if pinned_setting() else 23.6e9
    assert result["host_bytes"]["teacher"] == pytest.approx(pinned, rel=0.01)
    assert result["largest_cache_tokens"] == pytest.approx(336_000, rel=0.02)
    assert result["decoded_at_once"]["rollout"] == 64
    assert result["decoded_at_once"]["evaluate"] >= 200
    assert "64 sequences, 2" in outcome.out
    assert "fits" in outcome.out and "8,190,735,360 parameters" in outcome.out


@pytest.mark.slow
def test_the_8b_preset_spends_spare_memory_on_layers_that_are_not_run_again(cli: Command) -> None:
    result = last_line(cli("plan", "qwen3_8b_80gb").out)
    kept = result["kept_layers"]
    assert kept >= 3 and result["fits"]
    assert result["peak_bytes"]["train"] <= 0.95 * 78 * GIB
    more = Estimate(load_config("qwen3_8b_80gb", [f"model.kept_layers={kept + 1}"]))
    assert more.peaks["train"] > 0.95 * 78 * GIB
    none = Estimate(load_config("qwen3_8b_80gb", ["model.kept_layers=0"]))
    assert {k: v for k, v in more.peaks.items() if k != "train"} == {
        k: v for k, v in none.peaks.items() if k != "train"
    }


@pytest.mark.exhaustive
@pytest.mark.usefixtures("offline")
def test_in_fp32_the_8b_model_does_not_fit_and_the_plan_says_what_does(cli: Command) -> None:
    outcome = cli("plan", "qwen3_8b_80gb", "model.dtype=float32")
    result = last_line(outcome.out)
    assert (outcome.code, result["fits"]) == (1, False)
    assert result["phases"]["train"]["optimizer_state"] / GIB == pytest.approx(61.0, rel=0.01)
    assert result["changes"] == ["model.dtype=bfloat16", "optimizer.adamw=auto"]
    assert "Fits with: model.dtype=bfloat16 optimizer.adamw=auto" in outcome.out
    assert Estimate(override(load_config("qwen3_8b_80gb", []), result["changes"])).fits


@pytest.mark.exhaustive
def test_the_other_plans_of_the_byte_budget() -> None:
    resident = Estimate(load_config("qwen3_8b_80gb", ["teacher.storage=device"]))
    assert resident.peaks["train"] / GIB == pytest.approx(77.3, rel=0.01)  # hardly
    exact = load_config("qwen3_8b_80gb", ["optimizer.adamw=exact"])
    assert not Estimate(exact).fits and changes(exact) == ["optimizer.adamw=8bit"]
    assert Estimate(load_config("qwen3_8b_80gb_full_vocabulary", [])).fits


# ---------------------------------------------------------------- smaller questions


@pytest.fixture
def small(small_model: Path) -> Config:
    """Without Liger's kernels, which one environment has and another one has not."""
    overrides = ["device=cuda", "memory_gib=0.1", "eval.samples=2", "model.liger=false"]
    return load_config(None, [f"model.path={small_model}", *overrides])


@pytest.mark.slow
def test_the_largest_micro_batch_fits_and_a_larger_one_does_not(small: Config) -> None:
    def planned(config: Config, tokens: int) -> Estimate:
        return Estimate(override(config, [f"optimizer.micro_batch_tokens={tokens}"]))

    tight = override(small, [f"memory_gib={planned(small, 3000).peaks['train'] / GIB}"])
    most = largest_micro_batch(override(tight, ["optimizer.micro_batch_tokens=1024"]))
    assert most == 2048 and planned(tight, most).fits
    assert not planned(tight, most + 1024).fits


@pytest.mark.slow
def test_kept_layers_and_long_scoring_are_given_up_where_they_do_not_fit(small: Config) -> None:
    thrifty = override(small, ["memory_gib=1", "model.gradient_checkpointing=true"])
    generous = override(thrifty, ["model.kept_layers=2"])
    between = (Estimate(thrifty).peaks["train"] + Estimate(generous).peaks["train"]) / 2
    assert changes(override(generous, [f"memory_gib={between / GIB}"])) == ["model.kept_layers=0"]
    long = override(thrifty, ["optimizer.micro_batch_tokens=64"])
    longer = override(long, ["teacher.micro_batch_tokens=9000"])
    peaks = [max(Estimate(config).peaks.values()) for config in (long, longer)]
    found = changes(override(longer, [f"memory_gib={sum(peaks) / 2 / GIB}"]))
    assert peaks[0] < peaks[1] and found == ["teacher.micro_batch_tokens=null"]


def test_a_cache_too_small_for_one_sequence_is_said(small: Config) -> None:
    tight = override(small, ["rollout.cache_gib=0.00001", "memory_gib=1"])
    result = Estimate(tight)
    assert not result.fits and result.refused is not None
    assert result.refused.startswith("rollout: the keys and values of 1 sequence of 128 tokens")
    assert changes(tight) == ["rollout.cache_gib=null"]


@pytest.mark.slow
def test_where_nothing_helps_there_are_no_changes(cli: Command, small: Config) -> None:
    outcome = cli(
        "plan",
        f"model.path={small.model.path}",
        "device=cuda",
        "memory_gib=0.0001",
        "model.dtype=bfloat16",
        "model.gradient_checkpointing=true",
        "teacher.storage=host",
        "optimizer.micro_batch_tokens=128",
    )
    assert outcome.code == 1 and "choose a smaller model" in outcome.out
    assert last_line(outcome.out)["changes"] == []


@pytest.mark.slow
def test_several_changes_are_the_fewest(small: Config) -> None:
    config = override(small, ["optimizer.micro_batch_tokens=4096"])
    plain = Estimate(config).peaks["train"]
    lean = [
        "model.dtype=bfloat16",
        "optimizer.adamw=auto",
        "teacher.storage=host",
        "model.gradient_checkpointing=true",
    ]
    least = Estimate(override(config, lean)).peaks["train"]
    assert least < plain / 3 + 64 * 2**20  # with the same workspaces
    tight = override(config, [f"memory_gib={1.05 * least / GIB}"])
    found = changes(tight)
    assert Estimate(override(tight, found)).fits
    for text in found:
        if text != "optimizer.adamw=auto":  # comes with the dtype
            assert not Estimate(override(tight, [other for other in found if other != text])).fits


@pytest.mark.slow
def test_the_lab_has_a_plan(cli: Command) -> None:
    result = last_line(cli("plan", "device=cpu").out)
    assert result["fits"] and result["parameters"] == 642_368 and result["host_bytes"] == {}
    assert result["largest_micro_batch_tokens"] is None  # one holds a whole step


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.path=nobody/nothing"], "config.json"),
        (["rollout.engine=vllm"], "rollout.engine"),
        *slow(
            (["model.path=a/b/c/d"], "config.json"),
            (["model.path={empty}"], "config.json cannot be read"),
            (["model.path={broken}"], "config.json cannot be read"),
            (["model.path={list}"], "names no model_type"),
            (["model.path={strange}"], "makes no model"),
            (["model.path={mamba}"], "cannot be packed"),
            (["zebra=1"], "unknown key zebra"),
            (["memory_gib=0"], "memory_gib"),
        ),
    ],
)
def test_bad_input_is_one_line(
    overrides: list[str], named: str, cli: Command, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for name, text in {
        "broken": "{",
        "list": "[1]",
        "strange": '{"model_type": "zebra"}',
        "mamba": '{"model_type": "mamba", "num_hidden_layers": 2}',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    places = {path.name: path for path in tmp_path.iterdir()}
    outcome = cli("plan", *(text.format(**places) for text in overrides))
    assert outcome.code == 2 and outcome.out == ""
    assert named in outcome.err and outcome.err.count("\n") == 1
