"""The 8B bench at a tiny shape on the CPU: what it runs there is what it will run on a GPU."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_8b
import forced_run
import gpu_suite
import pytest
import suite_8b_objective
import suite_8b_steps
import suite_8b_trl
import torch
from suite_record import Plan, Skipped

from sodfast.rollout import native
from sodfast.rollout.batch import Batch

TINY = Plan(torch.device("cpu"), full=False)
FULL = Plan(torch.device("cpu"), full=True)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The bench sets what a process on a GPU needs."""
    for name in ("PYTORCH_ALLOC_CONF", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1" if name == "TRITON_INTERPRET" else "")
    yield
    assert native.Batch is Batch


# ---------------------------------------------------------------- parts


@pytest.mark.slow
def test_drafts_leave_forced_lengths_as_they_are_and_take_fewer_passes(tmp_path: Path) -> None:
    assert bench_8b.main(["8b_speculation", "--rehearse", "--out", str(tmp_path)]) == 0
    cases = json.loads((tmp_path / "8b_speculation.json").read_text())["cases"]
    brought = {name: found["rows"][0]["tokens_per_pass"] for name, found in cases.items()}
    assert list(brought) == ["off", "3 drafts", "7 drafts", "15 drafts"]
    assert brought["off"] == 1 and all(brought[name] > 1.2 for name in list(brought)[1:])
    assert len({found["rows"][0]["tokens"] for found in cases.values()}) == 1
    for found in [cases[name] for name in list(brought)[1:]]:
        first, again = found["rows"]
        assert first["answers_as_off"] == 1  # in fp32 on a CPU
        assert again["tokens_per_pass"] > 1.2


@pytest.mark.exhaustive
def test_a_part_is_gone_on_with_where_it_ended(tmp_path: Path) -> None:
    """Steps are written one by one, and alike whichever is the first of a process."""
    arguments = ["8b_steps", "--rehearse", "--out", str(tmp_path)]
    assert bench_8b.main(arguments) == 0
    file = tmp_path / "8b_steps.json"
    content = json.loads(file.read_text())
    assert list(content["cases"]) == ["step 2", "step 3", "step 4"]
    for name, found in content["cases"].items():
        assert found["responses"] == 16 and found["longest"] == 24
        assert found["response_tokens"] == pytest.approx(16 * 9, abs=8)
        *phases, utilisation = found["rows"]
        assert [row["name"] for row in phases] == ["rollout", "teacher", "train"]
        assert all(row["milliseconds"] > 0 and row["planned_bytes"] > 0 for row in phases)
        share = utilisation["flops_per_second"] / utilisation["measured_flops_per_second"]
        assert utilisation["share_of_measured"] == pytest.approx(share)
        nominal = utilisation["flops_per_second"] / utilisation["nominal_flops_per_second"]
        assert utilisation["share_of_nominal"] == pytest.approx(nominal)
        line = found["line"]
        assert line["step"] == int(name.removeprefix("step "))
        assert line["distill/reprompt_fraction"] == 1 and line["reward/mean"] == 0.5
        assert line["distill/divergence"] > 0 and line["optim/grad_norm"] > 0
    kept = content["cases"].pop("step 3")
    file.write_text(json.dumps(content))
    assert bench_8b.main(arguments) == 0
    again = json.loads(file.read_text())["cases"]
    assert again["step 2"] == content["cases"]["step 2"]
    assert again["step 3"]["rows"] != kept["rows"]
    assert again["step 3"]["response_tokens"] == kept["response_tokens"]
    assert (tmp_path / "bench_8b.md").is_file() and not (tmp_path / "targets.md").exists()


@pytest.mark.slow
def test_a_scoring_budget_saves_passes(tmp_path: Path) -> None:
    assert bench_8b.main(["8b_teacher", "--rehearse", "--out", str(tmp_path)]) == 0
    cases = json.loads((tmp_path / "8b_teacher.json").read_text())["cases"]
    own, training = cases["the preset's scoring budget"], cases["training's micro-batches"]
    assert own["passes"] < training["passes"]
    assert own["bytes_a_pass"] == training["bytes_a_pass"] > 0
    assert all(row["milliseconds"] > 0 for case in cases.values() for row in case["rows"])


def test_parts_fit_their_minutes_and_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for part, module in bench_8b.PARTS.items():
        cases = __import__(module).cases(FULL)
        assert sum(case.minutes for case in cases) <= gpu_suite.MINUTES_A_PART, part
    assert bench_8b.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert set(listed) == set(bench_8b.PARTS)


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_8b.main(["8b_steps"]) == 2
    assert capsys.readouterr().out.startswith("bench/bench_8b.py needs a CUDA device")


def test_trl_is_run_at_the_largest_size_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(name: str, device: Any, prompts: int, tokens: int) -> dict[str, Any]:
        if name.endswith("-4B"):
            raise torch.OutOfMemoryError("Tried to allocate 1 GiB. GPU 0 has none")
        return {"name": name, "milliseconds": 1.0}

    monkeypatch.setattr(suite_8b_trl, "two_steps", steps)
    monkeypatch.setattr(suite_8b_trl, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    cases = {case.name: case.run for case in suite_8b_trl.cases(FULL)}
    with pytest.raises(Skipped, match="does not fit: Tried to allocate 1 GiB"):
        cases["4B"]()
    assert cases["1.7B"]()["rows"] == [{"name": "Qwen/Qwen3-1.7B", "milliseconds": 1.0}]
    with pytest.raises(Skipped, match=r"1\.7B fits"):
        cases["0.6B"]()


# ---------------------------------------------------------------- a run whose lengths are given


@pytest.mark.exhaustive
def test_a_run_writes_no_checkpoint_and_loads_nothing() -> None:
    config = forced_run.EIGHT_B.config(torch.device("cpu"))
    assert (config.model.path, config.model.random) == (None, "Qwen/Qwen3-8B")
    assert (config.checkpoint.every, config.eval.every, config.memory_gib) == (0, 0, 78)
    assert isinstance(config.model.kept_layers, int)


def test_lengths_have_their_mean_and_their_longest() -> None:
    lengths = forced_run.forced_lengths(64, 1500, 8192, 3)
    assert len(lengths) == 64 and lengths.count(8192) >= 3
    assert sum(lengths) / 64 == pytest.approx(1500, rel=0.01)
    assert 1 <= min(lengths) < 200


def test_any_answer_is_shown_to_the_teacher_at_its_own_length() -> None:
    tokenizer = forced_run.word_tokenizer(50)
    assert tokenizer("w7 w49 w2").input_ids == [7, 49, 2]
    assert tokenizer(tokenizer.decode([3, 30, 48])).input_ids == [3, 30, 48]


def test_flops_are_those_of_the_products() -> None:
    """By hand for one sequence of 3 tokens, of which 2 are the response, in a toy shape."""
    config = SimpleNamespace(
        hidden_size=5,
        intermediate_size=7,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=3,
        vocab_size=11,
    )
    sample = SimpleNamespace(prompt=torch.zeros(2), response=torch.zeros(2))
    body = 5 * 6 + 2 * (5 * 3) + 6 * 5 + 3 * 5 * 7  # q, k and v, output, gated MLP
    attention = 2 * (3 * 3 / 2 * 6) * 2  # scores and values over half a square
    expected = 3 * 2 * (2 * body * 3 + attention) + (3 + 1) * 2 * 5 * 11 * 2
    rollouts: Any = SimpleNamespace(samples=[sample])
    assert forced_run.training_flops(SimpleNamespace(config=config), rollouts) == expected


def test_the_objective_agrees_with_its_definition() -> None:
    found = suite_8b_objective.agreement(TINY, rows=64)
    assert found["positions"] == 64
    assert found["loss_error"] < 0.01 and found["entropy_error"] < 0.01
    assert found["hidden_cosine"] > 0.999 and found["head_cosine"] > 0.999
    assert all(row["met"] for row in found["checks"])


def test_a_step_is_judged_by_its_time_its_utilisation_and_the_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = {"time/step": 80.0} | {f"time/{p}": 20.0 for p in ("rollout", "teacher", "train")}
    line |= {f"memory/peak_{p}_bytes": 104.0 for p in ("rollout", "teacher", "train")}
    sample = SimpleNamespace(prompt=torch.zeros(2), response=torch.zeros(2))
    run = suite_8b_steps.Run(FULL)
    trainer: Any = SimpleNamespace(config=SimpleNamespace(model=SimpleNamespace(kept_layers=3)))
    trainer.model = SimpleNamespace(network=None)
    monkeypatch.setitem(vars(run), "rate", 1e12)
    monkeypatch.setitem(vars(run), "trainer", trainer)
    run.setting = SimpleNamespace(lengths=lambda config: [2])  # type: ignore[assignment]
    run.seen[:] = [SimpleNamespace(samples=[sample])]
    monkeypatch.setattr(run, "take", lambda *_: line)
    monkeypatch.setattr(suite_8b_steps, "lengths_of", lambda rollouts: [])
    monkeypatch.setattr(suite_8b_steps, "training_flops", lambda network, rollouts: 1e13)
    peaks = {"rollout": 100.0, "teacher": 115.0, "train": 90.0}
    monkeypatch.setattr("sodfast.memory.estimate.Estimate", lambda *_: SimpleNamespace(peaks=peaks))
    found = run.step(2)
    assert {row["check"]: row["met"] for row in found["checks"]} == {
        "seconds": False,
        "training: share of the measured matrix rate": True,
        "rollout: peak off the plan": True,
        "teacher: peak off the plan": False,  # a plan that asks for too much is wrong, too
        "train: peak off the plan": False,
    }
