"""The plan of a run's memory against what torch's MemTracker counts, and what it says."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Command
from sodfast_kernels import linear_distillation_loss, linear_scratch_bytes
from sodfast_kernels.distillation import torch_path
from sodfast_kernels.distillation.arguments import Call, Settings, Sides, Tokens
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from sodfast import lab, rehearsal, session
from sodfast.config import PRESETS, Config, load_config, override
from sodfast.console import Reporter
from sodfast.errors import UsageError
from sodfast.footprint import GIB, Footprint, Lengths, architecture
from sodfast.plan import Plan, changes, largest_micro_batch, plan
from sodfast.rehearsal import LiveBytes, Rehearsal
from sodfast.session import build_trainer
from sodfast.trainer import Trainer

# ---------------------------------------------------------------- measured over real training


class Tracker(MemTracker):
    """Without statistics of modules, which may then run more than once."""

    def _pass(self, *_: Any) -> None: ...

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pass


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the lab's size; its answers end at random."""
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("untrained")
    Qwen3ForCausalLM(lab.architecture(lab.LabConfig())).save_pretrained(path)
    lab.build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def started(untrained: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer after its first step: teacher and optimizer have what they will have throughout."""

    def start(*overrides: str) -> Trainer:
        config = load_config(
            "lab",
            [
                f"model.path={untrained}",
                f"out={tmp_path / 'run'}",
                "task.train=48",
                "task.test=8",
                "steps=1",
                "rollout.max_new_tokens=20",
                "eval.samples=2",
                "teacher.context=none",  # every rollout is scored
                "schedule.kind=fixed",
                *overrides,
            ],
        )
        trainer = build_trainer(config, None, Reporter())
        trainer.train()
        trainer.run.close()
        return trainer

    return start


def measured(trainer: Trainer, phase: Callable[[], Any], *others: Tensor) -> tuple[Any, int]:
    """What a phase returns, and the most bytes of tensors there were at once in it."""
    states = [s for state in trainer.optimizer.state.values() for s in state.values()]
    kept = [trainer.engine.memory, *states, *trainer.teacher.network.parameters(), *others]
    tracker = Tracker()
    tracker.track_external(
        trainer.model.network, *(tensor for tensor in kept if isinstance(tensor, Tensor))
    )
    with tracker:
        result = phase()
    return result, tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.gradient_checkpointing=true", "optimizer.micro_batch_tokens=256"],
        ["model.dtype=bfloat16", "teacher.storage=host", "objective.top_k=5"],
        ["schedule.kind=trust_region", "optimizer.state=8bit"],
        ["model.lora.rank=4", "model.dtype=bfloat16"],
    ],
    ids=lambda overrides: ",".join(text.partition("=")[2] for text in overrides) or "defaults",
)
def test_each_phases_peak_is_the_plans_within_five_percent(
    overrides: list[str], started: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where the objective's own buffers are hidden in one operation from both sides."""
    if "model.lora.rank=4" in overrides:
        pytest.importorskip("peft", reason="needs peft (pip install 'sodfast[lora]')")
    trainer = started(*overrides)
    peaks = {}
    rollouts, peaks["rollout"] = measured(trainer, lambda: trainer._rollout(2))
    updates = trainer._updates(2, rollouts)
    scores, peaks["teacher"] = measured(trainer, lambda: trainer._score(rollouts, updates))
    hidden = [rows for rows in scores.hidden if rows is not None]
    line, peaks["train"] = measured(
        trainer,
        lambda: trainer._update(2, rollouts, updates, scores, lambda: None),
        *hidden,
        scores.head,
    )
    line |= trainer._statistics(rollouts)
    _, peaks["refresh"] = measured(trainer, lambda: trainer._move_teacher(2, line))
    _, peaks["evaluate"] = measured(trainer, lambda: trainer._evaluate(2))

    lengths = [
        Lengths(len(sample.prompt), len(context), len(sample.response))
        for sample, context in zip(rollouts.samples, rollouts.contexts, strict=True)
        if context is not None
    ]
    monkeypatch.setattr(rehearsal, "linear_scratch_bytes", lambda *_, **__: 0)
    planned = plan(trainer.config, lengths)
    assert planned.peaks == pytest.approx(peaks, rel=0.05)
    assert planned.fits and planned.parameters == sum(
        parameter.numel() for parameter in trainer.model.network.parameters()
    )


def test_live_bytes_counts_storages_once_and_while_they_live() -> None:
    known = torch.zeros(1000)
    with LiveBytes([known]) as live:
        a = torch.zeros(100)
        b = a.view(10, 10)[2:]
        del a
        known.add_(1)
        known.view(10, 100)
        assert live.take_peak() == 400
        del b
        c = torch.zeros(50)
        assert live.take_peak() == 400  # what there was when the last peak was taken
        del c
        assert live.take_peak() == 200
        assert live.take_peak() == 0


# ---------------------------------------------------------------- the objective's own buffers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [None, 20])
@pytest.mark.parametrize("rows", [7, 900])
def test_the_objectives_buffers_on_a_cpu_are_bounded(
    dtype: torch.dtype, top_k: int | None, rows: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    sides = [
        torch.randn(count, 32, generator=generator).to(dtype) for count in (rows, 4000, rows, 4000)
    ]
    sides[0].requires_grad_()
    sides[1].requires_grad_()
    weight = torch.full((rows,), 1 / rows)
    settings = Settings(0.5, 1.0, None, top_k, True, 0.2, 0.28, None, False, None)
    with LiveBytes([*sides, weight]) as live, torch.no_grad():
        results = torch_path.evaluate(
            Call(
                Sides(*sides, None, None),
                Tokens(weight, None, None, None, None),
                settings,
                None,
                True,
                True,
            )
        )
        taken = live.take_peak() - sum(result.nbytes for result in results)
    bound = linear_scratch_bytes(*sides, top_k=top_k, backend="torch")
    assert 0.5 * bound < taken <= bound


@pytest.mark.parametrize("top_k", [None, 20])
@pytest.mark.parametrize("rows", [40, 700])
def test_the_objectives_buffers_on_a_gpu_are_what_is_allocated(
    top_k: int | None, rows: int
) -> None:
    pytest.importorskip("triton")
    from sodfast_kernels.distillation import triton_path

    sides = [torch.zeros(count, 32) for count in (rows, 4000, rows, 4000)]
    settings = Settings(0.5, 1.0, None, top_k, True, 0.2, 0.28, None, False, None)
    with rehearsal._no_kernels(), LiveBytes(sides) as live:
        results = triton_path.evaluate(
            Call(
                Sides(*sides, None, None),
                Tokens(torch.ones(rows), None, None, None, None),
                settings,
                None,
                True,
                True,
            )
        )
        taken = live.take_peak() - sum(result.nbytes for result in results)
    # The candidates of a top-k tile are gone when the slab's gradients are computed.
    bound = linear_scratch_bytes(*sides, top_k=top_k, backend="triton")
    vectors = 32 * rows
    assert taken - vectors <= bound < 1.1 * taken


def test_the_heads_gradient_is_summed_in_fp32_over_several_slabs() -> None:
    def scratch(rows: int) -> int:
        sides = [torch.empty(n, 32, dtype=torch.bfloat16) for n in (rows, 4000, rows, 4000)]
        return linear_scratch_bytes(*sides, backend="triton")

    assert scratch(65) - scratch(64) >= 4 * 32 * 4000 > scratch(64) - scratch(63)


def test_the_kernels_run_again_after_a_rehearsal() -> None:
    pytest.importorskip("triton")
    hidden, head = torch.randn(3, 8), torch.randn(20, 8)
    with rehearsal._no_kernels():
        pass
    loss = [
        linear_distillation_loss(hidden, head, hidden + 1, head, backend=backend).loss
        for backend in ("torch", "triton")
    ]
    torch.testing.assert_close(loss[0], loss[1])


# ---------------------------------------------------------------- deep networks


def gemma() -> dict[str, Any]:
    return {
        "model_type": "gemma2", "vocab_size": 500, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "sliding_window": 32, "final_logit_softcapping": 30.0,
    }  # fmt: skip


def qwen(layers: int = 8) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "vocab_size": 500, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "tie_word_embeddings": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("contents", "recompute", "tokens"),
    [(qwen(), False, 8), (gemma(), True, 60)],
    ids=["qwen3", "gemma2-recomputed"],
)
def test_a_deep_network_is_what_two_depths_of_it_say(
    contents: dict[str, Any], recompute: bool, tokens: int
) -> None:
    """Also where the embedding's gradient outweighs the activations of few layers."""
    objective = load_config(None, []).objective
    deep, whole = (Rehearsal(contents, torch.float32, recompute, False) for _ in range(2))
    period = 2 if contents["model_type"] == "gemma2" else 1
    assert deep.depths == (2 * period, 3 * period)
    whole.depths = None
    sequences = ((5, tokens), (4, 7))
    for each in (deep, whole):
        each.training(objective, None, sequences, 64, True, False)
        each.scoring(sequences)
    assert deep._measured == pytest.approx(whole._measured, rel=1e-4)


def test_layers_that_do_not_repeat_are_all_measured() -> None:
    odd = {**gemma(), "layer_types": ["full_attention"] + ["sliding_attention"] * 7}
    assert Rehearsal(odd, torch.float32, False, False).depths is None
    assert Rehearsal(qwen(3), torch.float32, False, False).depths is None


def test_ligers_kernels_keep_less_and_leave_other_networks_alone() -> None:
    pytest.importorskip("liger_kernel")
    objective = load_config(None, []).objective

    def peak(liger: bool) -> int:
        network = Rehearsal(qwen(3), torch.bfloat16, False, liger)
        return network.training(objective, None, ((5, 400),), 64, True, True)

    before = peak(False)
    assert peak(True) < 0.9 * before
    assert peak(False) == pytest.approx(before, rel=1e-4)


# ---------------------------------------------------------------- Qwen3 on one 80 GB GPU


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan opened a connection")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def last_line(out: str) -> Any:
    return json.loads(out.splitlines()[-1])


@pytest.mark.usefixtures("offline")
def test_the_8b_preset_fits_as_the_byte_budget_says(cli: Command) -> None:
    outcome = cli("plan", "qwen3_8b_80gb")
    result = last_line(outcome.out)
    assert (outcome.code, outcome.err, result["fits"]) == (0, "", True)
    assert result["parameters"] == 8_190_735_360
    assert result["budget_bytes"] == 78 * GIB >= max(result["peak_bytes"].values())
    assert result["peak_bytes"] == {p: sum(i.values()) for p, i in result["phases"].items()}
    gib = {item: size / GIB for item, size in result["phases"]["train"].items()}
    assert gib.pop("activations") == pytest.approx(12, rel=0.1)
    assert gib == pytest.approx(
        {
            "weights": 15.26,
            "gradients": 15.26,
            "optimizer_state": 15.5,
            "teacher_hidden": 4.0,
            "teacher_head": 1.16,
        },
        rel=0.02,
    )
    assert result["peak_bytes"]["train"] / GIB == pytest.approx(63.2, rel=0.02)
    assert result["phases"]["teacher"]["teacher_stream"] == pytest.approx(3.6e9, rel=0.02)
    assert result["host_bytes"]["teacher"] == pytest.approx(23.6e9, rel=0.01)  # pinned
    assert result["largest_cache_tokens"] == pytest.approx(336_000, rel=0.02)
    assert "fits" in outcome.out and "8,190,735,360 parameters" in outcome.out


@pytest.mark.usefixtures("offline")
def test_in_fp32_the_8b_model_does_not_fit_and_the_plan_says_what_does(cli: Command) -> None:
    outcome = cli("plan", "qwen3_8b_80gb", "model.dtype=float32")
    result = last_line(outcome.out)
    assert (outcome.code, result["fits"]) == (1, False)
    assert result["phases"]["train"]["optimizer_state"] / GIB == pytest.approx(61.0, rel=0.01)
    assert result["changes"] == ["model.dtype=bfloat16", "optimizer.state=auto"]
    assert "Fits with: model.dtype=bfloat16 optimizer.state=auto" in outcome.out
    assert plan(override(load_config("qwen3_8b_80gb", []), result["changes"])).fits


def test_the_other_plans_of_the_byte_budget() -> None:
    resident = plan(load_config("qwen3_8b_80gb", ["teacher.storage=device"]))
    assert resident.peaks["train"] / GIB == pytest.approx(77.3, rel=0.01)  # hardly
    exact = load_config("qwen3_8b_80gb", ["optimizer.state=exact"])
    assert not plan(exact).fits and changes(exact) == ["optimizer.state=8bit"]
    assert plan(load_config("qwen3_8b_80gb_full_vocabulary", [])).fits


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("qwen3_4b_80gb", 4_022_468_096),
        ("qwen3_1_7b_80gb", 1_720_574_976),
        ("qwen3_0_6b_80gb", 596_049_920),
    ],
)
def test_the_siblings_are_known_offline(preset: str, parameters: int, offline: None) -> None:
    footprint = Footprint(load_config(preset, []), None)
    assert footprint.parameters == parameters
    assert footprint.weights == 2 * parameters
    assert footprint.network.config.rope_parameters["rope_theta"] == 1e6


# ---------------------------------------------------------------- smaller questions


def write_model(path: Path, contents: Any) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(contents))
    return f"model.path={path}"


@pytest.fixture
def small(tmp_path: Path) -> Config:
    model = write_model(tmp_path / "model", qwen(2))
    return load_config(None, [model, "device=cuda", "memory_gib=0.1", "eval.samples=2"])


def test_the_largest_micro_batch_fits_and_a_larger_one_does_not(small: Config) -> None:
    def planned(config: Config, tokens: int) -> Plan:
        return plan(override(config, [f"optimizer.micro_batch_tokens={tokens}"]))

    tight = override(small, [f"memory_gib={planned(small, 3000).peaks['train'] / GIB}"])
    most = largest_micro_batch(override(tight, ["optimizer.micro_batch_tokens=1024"]))
    assert most == 2048 and planned(tight, most).fits
    assert not planned(tight, most + 1024).fits


def test_a_cache_too_small_for_one_sequence_is_said(small: Config) -> None:
    tight = override(small, ["rollout.cache_gib=0.00001", "memory_gib=1"])
    result = plan(tight)
    assert not result.fits and result.refused is not None
    assert result.refused.startswith("rollout: the keys and values of 1 sequence of 128 tokens")
    assert changes(tight) == ["rollout.cache_gib=null"]


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


def test_several_changes_are_the_fewest(small: Config) -> None:
    config = override(small, ["optimizer.micro_batch_tokens=4096"])
    plain = plan(config).peaks["train"]
    lean = [
        "model.dtype=bfloat16",
        "optimizer.state=auto",
        "teacher.storage=host",
        "model.gradient_checkpointing=true",
    ]
    least = plan(override(config, lean)).peaks["train"]
    assert least < plain / 3
    tight = override(config, [f"memory_gib={1.05 * least / GIB}"])
    found = changes(tight)
    assert plan(override(tight, found)).fits
    for text in found:
        if text != "optimizer.state=auto":  # comes with the dtype
            assert not plan(override(tight, [other for other in found if other != text])).fits


def test_other_architectures_have_a_plan_too(tmp_path: Path) -> None:
    """What the native engine does not know runs under transformers' generate."""
    config = load_config(None, [write_model(tmp_path / "model", gemma()), "device=cuda"])
    result = plan(config)
    assert result.fits and result.refused is None
    # 64 sequences of 32 + 96 tokens; keys and values of 8 layers with 2 heads of 16 numbers
    assert result.phases["rollout"]["kv_cache"] == 64 * 128 * 8 * 2 * 2 * 16 * 4


def test_what_is_not_scored_is_not_kept(small: Config) -> None:
    assert (
        "teacher_hidden" not in plan(override(small, ["objective.distill_coef=0"])).phases["train"]
    )


def test_the_lab_has_a_plan(cli: Command) -> None:
    result = last_line(cli("plan", "device=cpu").out)
    assert result["fits"] and result["parameters"] == 642_368 and result["host_bytes"] == {}
    assert result["largest_micro_batch_tokens"] is None  # one holds a whole step


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.path=nobody/nothing"], "config.json"),
        (["model.path=a/b/c/d"], "config.json"),
        (["model.path={empty}"], "config.json cannot be read"),
        (["model.path={broken}"], "config.json cannot be read"),
        (["model.path={list}"], "names no model_type"),
        (["model.path={strange}"], "makes no model"),
        (["model.path={mamba}"], "cannot be packed"),
        (["rollout.engine=vllm"], "rollout.engine"),
        (["zebra=1"], "unknown key zebra"),
        (["memory_gib=0"], "memory_gib"),
    ],
)
def test_bad_input_is_one_line(
    overrides: list[str], named: str, cli: Command, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    write_model(tmp_path / "list", [1])
    write_model(tmp_path / "strange", {"model_type": "zebra"})
    write_model(tmp_path / "mamba", {"model_type": "mamba", "num_hidden_layers": 2})
    places = {path.name: path for path in tmp_path.iterdir()}
    outcome = cli("plan", *(text.format(**places) for text in overrides))
    assert outcome.code == 2 and outcome.out == ""
    assert named in outcome.err and outcome.err.count("\n") == 1


def test_a_models_config_may_come_from_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "snapshot", qwen())
    monkeypatch.setattr(
        "sodfast.footprint.try_to_load_from_cache",
        lambda name, file: f"{model.partition('=')[2]}/{file}" if name == "some/model" else None,
    )
    assert architecture(load_config(None, ["model.path=some/model"])) == qwen()
    with pytest.raises(UsageError, match=r"config\.json"):
        architecture(load_config(None, ["model.path=another/model"]))


def test_known_models_are_what_the_presets_name() -> None:
    known = json.loads((PRESETS / "models.json").read_text())
    named = {load_config(path.stem, []).model.path for path in PRESETS.glob("qwen3*.yaml")}
    assert named == set(known)


# ---------------------------------------------------------------- the limit that is planned for


def test_the_allocator_is_held_to_the_planned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions = []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=141 * GIB)
    )
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, _: fractions.append(share)
    )
    session.limit_memory(torch.device("cpu"), 78)
    session.limit_memory(torch.device("cuda"), None)
    assert fractions == []
    session.limit_memory(torch.device("cuda"), 78)
    assert fractions == [78 / 141]
    with pytest.raises(UsageError, match=r"memory_gib=150: this GPU has 141\.0 GiB"):
        session.limit_memory(torch.device("cuda"), 150)


def test_the_caches_budget_knows_limit_and_reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    from sodfast.native import _free_bytes

    values = {
        "mem_get_info": (60, 140),
        "get_per_process_memory_fraction": 0.5,
        "memory_reserved": 30,
        "memory_allocated": 20,
    }
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert _free_bytes(torch.device("cuda")) == 70 - 20  # the limit
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)
    assert _free_bytes(torch.device("cuda")) == 60 + 30 - 20  # what is free or kept for reuse
