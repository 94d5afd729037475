"""TRL's loss by our kernels: the same losses and gradients, and no logits of a batch."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from networks import MODELS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sodfast.errors import UsageError
from sodfast.integrations.trl import TeacherScheduleCallback, use_fused_loss
from sodfast.integrations.trl.fused import Projection

pytest.importorskip("trl", reason="TRL is absent: pip install 'sodfast[trl]'")
from trl_trainers import build_trainer, run, same, weights

pytestmark = pytest.mark.slow

FULL = {"distillation_mode": "full_logits"}
TOP_K = {"distillation_mode": "topk_logits", "distillation_topk": 5}
TAIL = {**TOP_K, "distillation_add_tail": True}
# One batch of answers for several steps, so that ratios to the log-probs at sampling matter.
OFF_POLICY = {"steps_per_generation": 4, "num_iterations": 2, "learning_rate": 3e-3}
POLICY = {**FULL, **OFF_POLICY, "distillation_weight": 0.5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sdpo, full": ("sdpo", FULL),
    "sdpo, top-k": ("sdpo", TOP_K),
    "sdpo, top-k and tail": ("sdpo", TAIL),
    "sdpo, forward KL": ("sdpo", {**FULL, "distillation_alpha": 0.0}),
    "sdpo, reverse KL of top-k and tail at T 0.7": (
        "sdpo",
        {**TAIL, "distillation_alpha": 1.0, "temperature": 0.7},
    ),
    "sdpo, off policy": ("sdpo", {**FULL, **OFF_POLICY}),
    "sdpo, off policy, ratios uncapped": (
        "sdpo",
        {**TOP_K, **OFF_POLICY, "distillation_is_clip": None},
    ),
    "sdpo, truncated answers masked": ("sdpo", {**FULL, "mask_truncated_completions": True}),
    "sdpo, policy, dapo": ("sdpo", POLICY),
    "sdpo, policy, grpo": ("sdpo", {**POLICY, "loss_type": "grpo"}),
    "sdpo, policy, dr_grpo": ("sdpo", {**POLICY, "loss_type": "dr_grpo"}),
    "sdpo, policy alone": ("sdpo", {**POLICY, "distillation_weight": 0.0}),
    "sdft, full": ("sdft", {**FULL, "num_loss_tokens_to_skip": 2}),
    "sdft, top-k and tail": ("sdft", TAIL),
    "sdft, off policy": ("sdft", {**FULL, **OFF_POLICY}),
}


class Compared(NamedTuple):
    """A loss of ours, TRL's, and the norms of the gradients' difference and of TRL's."""

    found: float
    expected: float
    error: float
    norm: float


def distance(
    found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]
) -> tuple[float, float]:
    assert {name for name in found if found[name] is None} == {
        name for name in wanted if wanted[name] is None
    }
    pairs = [(one, wanted[name]) for name, one in found.items() if one is not None]
    error = sum(float((one - other).double().square().sum()) for one, other in pairs)
    norm = sum(float(other.double().square().sum()) for _, other in pairs)
    return error**0.5, norm**0.5


def hold(compared: list[Compared], tolerance: float) -> None:
    """Equal to rounding."""
    for one in compared:
        assert one.found == pytest.approx(one.expected, rel=tolerance, abs=tolerance)
        assert one.error <= tolerance * (one.norm + 0.1)


def gradients(model: torch.nn.Module) -> dict[str, Tensor | None]:
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def beside_trl(trainer: Any) -> list[Compared]:
    """Let every loss of `trainer` be computed by its class, too, and hold the two against each
    other; returns what has been compared, as it goes on."""
    compared: list[Compared] = []
    kind = type(trainer)
    own = {name: value for name, value in vars(trainer).items() if hasattr(kind, name)}

    def compute_loss(model: Any, inputs: Any, **given: Any) -> Tensor:
        earlier = gradients(model)
        for name in own:
            delattr(trainer, name)
        expected = kind.compute_loss(trainer, model, inputs, **given)
        expected.backward()
        wanted = gradients(model)
        vars(trainer).update(own)
        # The log-probs at sampling, too, are equal to rounding.
        found = kind.compute_loss(trainer, model, inputs, **given)
        found.backward(retain_graph=True)
        error = distance(gradients(model), wanted)
        compared.append(Compared(float(found), float(expected), *error))
        for name, p in model.named_parameters():
            p.grad = earlier[name]
        return found

    own["compute_loss"] = compute_loss
    vars(trainer).update(own)
    return compared


LONG = ("sdpo, full", "sdpo, top-k", "sdpo, top-k and tail", "sdft, full", "sdft, top-k and tail")


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_trls(case: str, tiny_model: Path, tmp_path: Path) -> None:
    """In fp64 the two differ by its rounding; where there is a tail, by the 1e-7 that is the least
    mass that TRL gives it."""
    compared = compare(case, 4, torch.float64, tiny_model, tmp_path)
    hold(compared, 1e-7 if "tail" in case else 1e-9)
    assert sum(one.norm > 1e-4 for one in compared) >= 4


@pytest.mark.parametrize("case", LONG)
def test_over_twenty_steps_in_fp32_they_are_trls(
    case: str, tiny_model: Path, tmp_path: Path
) -> None:
    """To the rounding of fp32. TRL's formula for a tail, log(1 − Σp), keeps three digits where the
    tail holds a ten-thousandth of the mass."""
    compared = compare(case, 20, torch.float32, tiny_model, tmp_path)
    hold(compared, 1e-3 if "tail" in case else 2e-5)
    assert sum(one.norm > 1e-4 for one in compared) >= 20


def compare(case: str, steps: int, dtype: torch.dtype, model: Path, out: Path) -> list[Compared]:
    kind, changed = CASES[case]
    given = {"max_steps": steps, "model_init_kwargs": {"dtype": dtype}, **changed}
    trainer = build_trainer(kind, model, out, **given)
    use_fused_loss(trainer)
    compared = beside_trl(trainer)
    run(trainer)
    assert len(compared) == 2 * steps
    return compared


@pytest.mark.parametrize("kind", ["sdpo", "sdft"])
def test_a_run_logs_what_trls_own_logs(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    """Two runs of twenty steps, each on its own answers."""
    given = {"max_steps": 20, **OFF_POLICY, "learning_rate": 1e-4}
    theirs = run(build_trainer(kind, tiny_model, tmp_path / "theirs", **given))
    ours = build_trainer(kind, tiny_model, tmp_path / "ours", **given)
    use_fused_loss(ours)
    run(ours)
    for one, other in zip(theirs.state.log_history, ours.state.log_history, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            if not key.startswith("train_"):
                assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6), key


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore
        returned = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(returned):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return returned


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_no_operation_returns_the_logits_of_a_batch(
    weight: float, tiny_model: Path, tmp_path: Path
) -> None:
    largest = {}
    for fused in (False, True):
        changed = {**OFF_POLICY, "distillation_weight": weight, "max_completion_length": 64}
        trainer = build_trainer("sdpo", wide_vocabulary(tmp_path), tmp_path, **changed)
        if fused:
            use_fused_loss(trainer)
        trainer.model.train()
        rows = [trainer.train_dataset[i // 4] for i in range(32)]
        batch = trainer._prepare_training_batch(rows)
        with Largest() as watch:
            old = trainer._compute_rollout_logps(
                **{key: batch[key] for key in ("prompt_ids", "prompt_mask")},
                **{key: batch[key] for key in ("completion_ids", "completion_mask")},
            )
            trainer.current_gradient_accumulation_steps = 1
            trainer.compute_loss(trainer.model, {**batch, "old_per_token_logps": old}).backward()
        largest[fused] = watch.bytes
    logits = batch["completion_ids"].numel() * trainer.model.config.vocab_size * 4
    assert largest[False] >= logits
    assert largest[True] < logits / 10


def wide_vocabulary(folder: Path) -> str:
    """A model with more tokens than its tokenizer knows."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from sodfast.lab.model import build_tokenizer

    settings = {**MODELS["qwen3"].to_dict(), "vocab_size": 4000, "hidden_size": 16}
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**settings)).save_pretrained(folder / "wide")
    build_tokenizer().save_pretrained(folder / "wide")
    return str(folder / "wide")


@pytest.mark.parametrize("kind", ["cgtr", "trust_region"])
def test_with_a_schedule_it_is_the_run_with_trls_loss(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Under trust_region both models' hidden states stand beside each other."""
    schedule = {"cgtr": {"min_isolation": 2, "check_every": 2, "window": 1}}.get(
        kind, {"rate": 0.4}
    )
    found = []
    for fused in (False, True):
        trainer = build_trainer("sdpo", tiny_model, tmp_path, max_steps=6, learning_rate=1e-4)
        if fused:
            use_fused_loss(trainer)
        trainer.add_callback(TeacherScheduleCallback({"kind": kind, **schedule}))
        found.append([line["loss"] for line in run(trainer).state.log_history if "loss" in line])
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-7)
    assert max(found[0]) > 1e-5


def test_a_model_with_capped_logits(tmp_path: Path) -> None:
    trainer = build_trainer("sdpo", saved("gemma2", tmp_path), tmp_path, max_steps=3)
    use_fused_loss(trainer)
    compared = beside_trl(trainer)
    run(trainer)
    hold(compared, 2e-5)
    mixed = build_trainer("sdpo", saved("gemma2", tmp_path), tmp_path, max_steps=3)
    use_fused_loss(mixed)
    mixed.add_callback(TeacherScheduleCallback({"kind": "trust_region"}))
    with pytest.raises(UsageError, match="caps them"):
        run(mixed)


def saved(name: str, folder: Path) -> str:
    """A network of `networks.MODELS`, whose vocabulary covers the tokenizer's."""
    from transformers import AutoModelForCausalLM

    from sodfast.lab.model import build_tokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS[name]).save_pretrained(folder / name)
    build_tokenizer().save_pretrained(folder / name)
    return str(folder / name)


def test_in_bf16_it_trains_on_the_same_data(tiny_model: Path, tmp_path: Path) -> None:
    """Mixed precision: fp32 weights, bf16 products."""
    losses = []
    for fused in (False, True):
        trainer = build_trainer("sdpo", tiny_model, tmp_path, max_steps=2, bf16=True)
        if fused:
            use_fused_loss(trainer)
        losses.append(run(trainer).state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_a_batch_without_any_token_to_learn_from_gives_zero_gradients(
    tiny_model: Path, tmp_path: Path
) -> None:
    """As TRL's own does, so that the optimizer moves the same parameters."""
    changed = {"success_reward_threshold": 9.0, "max_steps": 1, "weight_decay": 0.5}
    found = []
    for fused in (False, True):
        trainer = build_trainer("sdpo", tiny_model, tmp_path, **changed)
        if fused:
            use_fused_loss(trainer)
        found.append(weights(run(trainer).model))
    assert same(*found)


def adapted(model: Path, **given: Any) -> Any:
    """With an adapter, which begins without any effect."""
    peft = pytest.importorskip("peft", reason="peft is absent: pip install 'sodfast[lora]'")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_pretrained(model)
    return peft.get_peft_model(network, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **given))


@pytest.mark.parametrize(
    ("whole", "teacher"), [(None, "ema"), (["lm_head"], "base"), (["lm_head"], "live")]
)
def test_adapters_are_trained_by_it_too(
    whole: list[str] | None, teacher: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Also beside a head that is trained whole, which TRL has no average of."""
    model = adapted(tiny_model, target_modules=["q_proj", "v_proj"], modules_to_save=whole)
    trainer = build_trainer("sdpo", model, tmp_path, max_steps=3, teacher_model_kind=teacher)
    before = weights(model.get_output_embeddings())
    use_fused_loss(trainer)
    compared = beside_trl(trainer)
    run(trainer)
    hold(compared, 2e-5)
    assert same(before, weights(model.get_output_embeddings())) == (whole is None)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"distillation_mode": "sampled_token", "distillation_alpha": 1.0}, "'full_logits'"),
        ({"distillation_mode": "topk_logits"}, "set distillation_topk"),
        ({**POLICY, "importance_sampling_level": "sequence"}, "set it to 'token'"),
    ],
)
def test_settings_that_it_does_not_have_are_refused(
    changed: dict[str, Any], words: str, tiny_model: Path, tmp_path: Path
) -> None:
    trainer = build_trainer("sdpo", tiny_model, tmp_path, **changed)
    with pytest.raises(UsageError, match=words):
        use_fused_loss(trainer)
    assert not any(isinstance(value, Projection) for value in vars(trainer).values())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_head_with_a_bias_is_refused(value: float, tiny_model: Path, tmp_path: Path) -> None:
    """Also one that begins at zero: TRL would train it."""
    trainer = build_trainer("sdpo", tiny_model, tmp_path)
    head = trainer.model.lm_head
    head.bias = torch.nn.Parameter(torch.full((head.out_features,), value))
    with pytest.raises(UsageError, match="its head has a bias or an adapter"):
        use_fused_loss(trainer)


def test_an_adapter_of_the_head_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """It begins at zero, so that it does not show in the logits."""
    model = adapted(tiny_model, target_modules=["q_proj", "lm_head"])
    trainer = build_trainer("sdpo", model, tmp_path, teacher_model_kind="live")
    with pytest.raises(UsageError, match="its head has a bias or an adapter"):
        use_fused_loss(trainer)


def test_logits_that_are_scaled_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    trainer = build_trainer("sdpo", tiny_model, tmp_path)
    scaled = trainer.model.lm_head.register_forward_hook(lambda *given: 2 * given[-1])
    with pytest.raises(UsageError, match="it may scale them"):
        use_fused_loss(trainer)
    scaled.remove()
    use_fused_loss(trainer)
