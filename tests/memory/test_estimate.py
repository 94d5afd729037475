"""The bytes of a configuration against what torch's MemTracker counts in training, and by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import gemma
from marks import slow
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from sodfast.commands import build_trainer
from sodfast.config import PRESETS, LabConfig, load_config
from sodfast.errors import UsageError
from sodfast.lab import model as lab_model
from sodfast.lab.model import build_tokenizer
from sodfast.memory import trace
from sodfast.memory.estimate import GIB, Estimate, Lengths
from sodfast.rollout.native import cache_size
from sodfast.rollout.speculation import MOST_TEXT_BYTES
from sodfast.run.console import Reporter
from sodfast.teacher import DRIFT_EVERY
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
    Qwen3ForCausalLM(lab_model.architecture(LabConfig())).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
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
    states = [s for state in trainer.student.optimizer.state.values() for s in state.values()]
    kept = [trainer.engine.memory, *states, *trainer.teacher.network.parameters(), *others]
    tracker = Tracker()
    tracker.track_external(
        trainer.model.network, *(tensor for tensor in kept if isinstance(tensor, Tensor))
    )
    with tracker:
        result = phase()
    return result, tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        *(
            pytest.param(overrides, marks=pytest.mark.slow)
            for overrides in (
                ["model.gradient_checkpointing=true", "optimizer.micro_batch_tokens=256"],
                ["model.dtype=bfloat16", "teacher.storage=host", "objective.top_k=5"],
                ["schedule.kind=trust_region", "optimizer.adamw=8bit"],
                ["model.lora.rank=4", "model.dtype=bfloat16"],
            )
        ),
    ],
    ids=lambda overrides: ",".join(text.partition("=")[2] for text in overrides) or "defaults",
)
def test_each_phases_peak_is_the_plans_within_five_percent(
    overrides: list[str], started: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where the objective's own buffers are hidden in one operation from both sides.
    Without drafts: how many of them `auto` takes depends on the clock."""
    overrides = [*overrides, "rollout.speculate=off"]
    if "model.lora.rank=4" in overrides:
        pytest.importorskip("peft", reason="needs peft (pip install 'sodfast[lora]')")
    trainer = started(*overrides)
    peaks = {}
    rollouts, peaks["rollout"] = measured(trainer, lambda: trainer._rollout(2))
    updates = trainer.student.plan(2, rollouts)
    scores, peaks["teacher"] = measured(trainer, lambda: trainer._score(rollouts, updates))
    hidden = [rows for rows in scores.hidden if rows is not None]
    line, peaks["train"] = measured(
        trainer,
        lambda: trainer.student.update(
            2, rollouts, updates, scores, trainer.teacher.prepare_update
        ),
        *hidden,
        scores.head,
    )
    line |= {"step": 2, **trainer._statistics(rollouts)}
    # In a step in which the drift of a teacher in host memory is measured.
    _, peaks["refresh"] = measured(trainer, lambda: trainer._move_teacher(DRIFT_EVERY, line))
    _, peaks["evaluate"] = measured(trainer, lambda: trainer.evaluator.evaluate(2))

    lengths = [
        Lengths(len(sample.prompt), len(hint.prompt), len(sample.response))
        for sample, hint in zip(rollouts.samples, rollouts.contexts, strict=True)
        if hint is not None
    ]
    monkeypatch.setattr(trace, "linear_scratch_bytes", lambda *_, **__: 0)
    planned = Estimate(trainer.config, lengths)
    assert planned.peaks == pytest.approx(peaks, rel=0.05)
    assert planned.fits and planned.parameters == sum(
        parameter.numel() for parameter in trainer.model.network.parameters()
    )


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["15", "auto"])
def test_passes_with_drafts_stay_within_the_plan(
    setting: str, started: Callable[..., Trainer]
) -> None:
    trainer = started(f"rollout.speculate={setting}")
    _, rollout = measured(trainer, lambda: trainer._rollout(2))
    _, evaluate = measured(trainer, lambda: trainer.evaluator.evaluate(2))
    planned = Estimate(trainer.config).peaks
    assert rollout <= 1.05 * planned["rollout"] and evaluate <= 1.05 * planned["evaluate"]


# ---------------------------------------------------------------- by hand


# Two layers of width 64 (4 query and 2 key-value heads of 16, 128 inside the MLP), 500 words.
LAYER_NUMBERS = 2 * 64 * 64 + 2 * 64 * 32 + 2 * 16 + 3 * 64 * 128 + 2 * 64
NUMBERS = 2 * LAYER_NUMBERS + 2 * 500 * 64 + 64
TENSORS = 2 * 11 + 3


@pytest.fixture
def by_hand(small_model: Path) -> Callable[..., Estimate]:
    """An estimate for 16 questions with 4 answers of 96 tokens each to prompts of 32, on a GPU,
    without Liger's kernels, which one environment has and another one has not."""

    def estimate(*overrides: str) -> Estimate:
        fixed = [f"model.path={small_model}", "device=cuda", "model.liger=false"]
        return Estimate(load_config(None, [*fixed, *overrides]))

    return estimate


@pytest.mark.parametrize("setting", [1, 15])
def test_the_texts_of_a_number_of_drafts_that_is_given(
    by_hand: Callable[..., Estimate], setting: int
) -> None:
    """Those of all samples of a call, more of which wait than have a row, and of the last ones; 64
    sources of each text."""
    settings = ["eval.samples=16", "task.test=500", "rollout.batch_size=64"]
    more = [f"rollout.speculate={setting}"]
    known, asked = by_hand(*settings, *more), by_hand(*settings, *more, "eval.questions=30")
    off = by_hand(*settings)

    def texts(estimate: Estimate, phase: str) -> int:
        return estimate.phases[phase]["activations"] - off.phases[phase]["activations"]

    each = 4 * (32 + 96 + 2 + 64)
    assert texts(known, "rollout") == (2 * 16 * 4 + 1) * each
    assert texts(known, "evaluate") == (2 * 500 * 16 + 1) * each
    assert texts(asked, "evaluate") == (2 * 30 * 16 + 1) * each
    # A pass has as many tokens whatever the number of drafts, so its logits take as much.
    assert known.phases["rollout"]["graphs"] == 256 * 500 * 4
    others = by_hand(*settings, *more, "eval.tasks.other.name=arithmetic")
    assert texts(others, "evaluate") == MOST_TEXT_BYTES


def test_weights_and_what_goes_with_them(by_hand: Callable[..., Estimate]) -> None:
    estimate = by_hand()
    assert (estimate.parameters, estimate.weights) == (NUMBERS, 4 * NUMBERS)
    assert estimate.host == {"loading": 4 * NUMBERS} and estimate.budget == 78 * GIB
    train = estimate.phases["train"]
    assert train.pop("activations") > 0
    assert train == {
        "workspaces": 2 * 32 * 2**20,  # of the stream that computes and of the one that captures
        "weights": 4 * NUMBERS,
        "gradients": 4 * NUMBERS,
        "teacher": 4 * NUMBERS,
        "optimizer_state": 2 * 4 * NUMBERS + 4 * TENSORS,  # torch counts steps in fp32
        "teacher_hidden": 64 * 96 * 64 * 4,
        "teacher_head": 500 * 64 * 4,
    }


@pytest.mark.parametrize(
    ("state", "size", "others"),
    [
        # Beside a byte for each of both moments, one for the exponent of each block of 256.
        ("8bit", 2, 2 * (2 * (16 + 8 + 8 + 16 + 1 + 1 + 3 * 32 + 1 + 1) + 2 * 125 + 1)),
        *slow(("fp32", 8, 0), ("exact", 10, 0)),  # exact: with what bf16 cuts off a weight
    ],
)
def test_the_optimizers_state_is_that_of_its_kind(
    state: str, size: int, others: int, by_hand: Callable[..., Estimate]
) -> None:
    estimate = by_hand("model.dtype=bfloat16", f"optimizer.adamw={state}")
    assert estimate._state() == size * NUMBERS + others + 8 * TENSORS


def test_a_teacher_in_host_memory_streams_three_layers_at_a_time(
    by_hand: Callable[..., Estimate],
) -> None:
    estimate = by_hand("teacher.storage=host")
    # Each tensor begins at a multiple of 512 bytes.
    layer = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 4 * 512
    embedding, norm_and_head = 4 * 500 * 64, 512 + 4 * 500 * 64
    assert estimate.phases["teacher"]["teacher_stream"] == 3 * layer + embedding + norm_and_head
    assert estimate.phases["refresh"]["teacher_stream"] == 3 * layer + norm_and_head
    assert estimate.phases["train"]["teacher_head"] == norm_and_head
    assert "teacher" not in estimate.phases["train"]
    assert estimate.host["teacher"] == 2 * 2**18 + 2 * 2**17  # powers of two


def test_under_trust_region_there_are_two_models_states_side_by_side(
    by_hand: Callable[..., Estimate],
) -> None:
    one, two = by_hand(), by_hand("schedule.kind=trust_region")
    for item in ("teacher_hidden", "teacher_head"):
        assert two.phases["train"][item] == 2 * one.phases["train"][item]
    assert two.phases["teacher"]["activations"] >= two.phases["teacher"]["teacher_hidden"]


def test_the_cache_is_the_pages_that_its_budget_holds(by_hand: Callable[..., Estimate]) -> None:
    page = 64 * 2 * 2 * 2 * 16 * 4  # tokens · layers · keys and values · heads · size · fp32
    whole = by_hand()
    # 32 + 96 tokens are two pages; one more is where idle rows write.
    assert whole.phases["rollout"]["kv_cache"] == (64 * 2 + 1) * page
    assert whole.phases["rollout"]["graphs"] == 64 * 500 * 4
    tight = by_hand(f"rollout.cache_gib={21.5 * page / GIB}")
    assert tight.phases["rollout"]["kv_cache"] == 21 * page
    assert tight.phases["rollout"]["graphs"] == 20 * 500 * 4
    taken = sum(tight.phases["rollout"].values()) - 21 * page
    assert tight.cache_bytes == tight.budget - taken
    assert tight.token_bytes == page // 64
    # Prompts of 32 with answers that are expected to take 12 fit into one page each.
    assert (whole.at_once(False), tight.at_once(False)) == (64, 20)


@pytest.mark.slow
def test_a_cpu_keeps_its_cache_and_takes_sequences_in_sixteens(
    by_hand: Callable[..., Estimate],
) -> None:
    slot = 128 * 2 * 2 * 2 * 16 * 4
    estimate = by_hand("device=cpu", f"rollout.cache_gib={40.5 * slot / GIB}")
    assert {items["kv_cache"] for items in estimate.phases.values()} == {32 * slot}
    assert estimate.host == {}


@pytest.mark.parametrize("device", ["cuda", *slow("cpu")])
def test_the_estimate_and_the_engine_give_one_answer(
    device: str, by_hand: Callable[..., Estimate]
) -> None:
    """The engine's own words, without its advice, which the plan replaces by its own."""
    estimate = by_hand(f"device={device}", "rollout.cache_gib=0.00005")
    with pytest.raises(UsageError) as caught:
        cache_size(estimate.network, 128, 64, 0.00005, 0, device == "cuda")
    assert estimate.refused == str(caught.value) and not estimate.fits


@pytest.mark.slow
def test_scoring_has_a_budget_of_its_own(by_hand: Callable[..., Estimate]) -> None:
    long, short = by_hand("teacher.micro_batch_tokens=8000"), by_hand()
    long_peaks, peaks = long.peaks, short.peaks
    shared = by_hand("optimizer.micro_batch_tokens=1000")
    own = by_hand("optimizer.micro_batch_tokens=1000", "teacher.micro_batch_tokens=4000")
    assert own.peaks["teacher"] > shared.peaks["teacher"]
    assert {**own.peaks, "teacher": 0} == {**shared.peaks, "teacher": 0}
    assert long_peaks["teacher"] <= peaks["teacher"] and long_peaks["train"] == peaks["train"]


@pytest.mark.slow
def test_auto_keeps_the_layers_that_fit_and_each_takes_more(
    by_hand: Callable[..., Estimate],
) -> None:
    checkpointed = "model.gradient_checkpointing=true"
    by_count = [
        by_hand(checkpointed, f"model.kept_layers={kept}").peaks["train"] for kept in range(3)
    ]
    assert by_count == sorted(set(by_count))
    for kept, peak in enumerate(by_count):
        budget = f"memory_gib={1.001 * peak / 0.95 / GIB}"
        assert by_hand(checkpointed, "model.kept_layers=auto", budget).kept_layers == kept
    assert by_hand("model.kept_layers=auto").kept_layers == 0
    tight = by_hand(checkpointed, "model.kept_layers=auto", "memory_gib=0.001")
    assert tight.kept_layers == 0 and not tight.fits
    with pytest.raises(UsageError, match=r"model\.kept_layers=3: the model has 2 decoder layers"):
        _ = by_hand(checkpointed, "model.kept_layers=3").peaks


@pytest.mark.slow
def test_longer_answers_take_more_and_smaller_micro_batches_less(
    by_hand: Callable[..., Estimate],
) -> None:
    peaks = by_hand().peaks
    longer = by_hand("rollout.max_new_tokens=120").peaks
    smaller = by_hand("optimizer.micro_batch_tokens=1024").peaks
    assert all(longer[phase] > peaks[phase] for phase in ("rollout", "teacher", "train"))
    assert smaller["train"] < peaks["train"] and smaller["rollout"] == peaks["rollout"]


# ---------------------------------------------------------------- which model


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("qwen3_4b_80gb", 4_022_468_096),
        *slow(("qwen3_1_7b_80gb", 1_720_574_976), ("qwen3_0_6b_80gb", 596_049_920)),
    ],
)
@pytest.mark.usefixtures("offline")
def test_the_siblings_are_known_offline(preset: str, parameters: int) -> None:
    estimate = Estimate(load_config(preset, []))
    assert estimate.parameters == parameters
    assert estimate.weights == 2 * parameters
    assert estimate.network.config.rope_parameters["rope_theta"] == 1e6


@pytest.mark.slow
def test_other_architectures_have_a_plan_too(tmp_path: Path) -> None:
    """What the native engine does not know runs under transformers' generate."""
    (tmp_path / "config.json").write_text(json.dumps(gemma()))
    result = Estimate(load_config(None, [f"model.path={tmp_path}", "device=cuda"]))
    assert result.fits and result.refused is None
    # 64 sequences of 32 + 96 tokens; keys and values of 8 layers with 2 heads of 16 numbers
    assert result.phases["rollout"]["kv_cache"] == 64 * 128 * 8 * 2 * 2 * 16 * 4


def test_what_is_not_scored_is_not_kept(by_hand: Callable[..., Estimate]) -> None:
    assert "teacher_hidden" not in by_hand("objective.distill_coef=0").phases["train"]


def test_known_models_are_what_the_presets_name() -> None:
    known = json.loads((PRESETS / "models.json").read_text())
    named = {load_config(path.stem, []).model.path for path in PRESETS.glob("qwen3*.yaml")}
    assert named == set(known) - {"sodfast/tiny"}  # which is for tests


@pytest.mark.slow
def test_a_run_of_random_weights_is_planned_as_the_shape_itself() -> None:
    by_path = Estimate(load_config("qwen3_8b_80gb", []))
    overrides = ["model.path=null", "model.random=Qwen/Qwen3-8B"]
    random = Estimate(load_config("qwen3_8b_80gb", overrides))
    assert random.phases == by_path.phases and random.parameters == by_path.parameters
    assert random.host.keys() == {"teacher"}  # nothing is loaded
    assert random.host["teacher"] == by_path.host["teacher"] and by_path.host["loading"] > 16e9


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", "hf"])
def test_a_run_without_evaluation_takes_no_memory_for_it(engine: str) -> None:
    overrides = ["model.random=sodfast/tiny", "device=cpu", f"rollout.engine={engine}"]
    phases = Estimate(load_config(None, overrides)).phases
    without = Estimate(load_config(None, [*overrides, "eval.every=0"])).phases
    assert "evaluate" in phases and without.keys() == phases.keys() - {"evaluate"}
