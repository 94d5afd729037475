"""TRL's distillation loss without logits [B, T, V] of student or teacher.

TRL's trainers make both models' logits and then a divergence. Here their `_forward_logits` returns
hidden states and a head in place of logits, and the functions that take these compute what they did
by `linear_distillation_loss`. Masks, weights of sequences, logging and gradient accumulation stay
TRL's.

Suffixes: B sequences, T tokens of an answer, H hidden size, V vocabulary, N tokens with a loss.
"""

from typing import Any, NamedTuple

import torch
from sodfast_kernels import DistillationOutput, linear_distillation_loss
from torch import Tensor, nn

from sodfast.errors import UsageError
from sodfast.integrations.trl.callback import MixedTeacher
from sodfast.integrations.trl.known import require_trainer
from sodfast.model.language_model import output_head


class Projection(NamedTuple):
    """What stands for logits [B, T, V]: hidden [B, T, H] @ head [V, H]ᵀ, at temperature 1."""

    hidden: Tensor
    head: Tensor


def use_fused_loss(trainer: Any, *, max_scratch_bytes: int | None = None) -> None:
    """Let TRL's `SDPOTrainer` or `SDFTTrainer` compute its loss by the fused kernels.

    Losses and gradients are TRL's to rounding, for `distillation_mode` "full_logits" and
    "topk_logits", with whatever the other settings are: alpha, tail, importance clipping, skipped
    tokens, and under SDPO the policy loss. Call it once, before `train`.

    Args:
        max_scratch_bytes: bound on temporary memory, as in `linear_distillation_loss`.

    Raises:
        UsageError: TRL or the trainer is not what `known` knows; another mode;
            importance_sampling_level="sequence" with a policy loss; a model whose logits are not
            its last hidden states times its output weights, or would not stay that in training
            (a head with a bias or an adapter).
    """
    require_trainer(trainer)
    args, name = trainer.args, type(trainer).__name__
    if args.distillation_mode not in ("full_logits", "topk_logits"):
        raise UsageError(
            f"{name} has distillation_mode={args.distillation_mode!r}, which takes no divergence "
            "of distributions: set it to 'full_logits', or to 'topk_logits' and distillation_topk"
        )
    if args.distillation_mode == "topk_logits" and args.distillation_topk is None:
        raise UsageError(f"{name} has distillation_mode='topk_logits': set distillation_topk")
    if trainer.use_teacher_server:
        raise UsageError(
            f"{name} takes its teacher's log-probs from a server: set use_teacher_server=False"
        )
    policy = getattr(args, "distillation_weight", 1.0) < 1.0
    if policy and trainer.importance_sampling_level != "token":
        raise UsageError(
            f"{name} has importance_sampling_level={trainer.importance_sampling_level!r}: the "
            "fused policy loss has a ratio for each token; set it to 'token'"
        )
    fused = _FusedLoss(trainer, max_scratch_bytes)
    fused.require_plain_head()
    trainer._forward_logits = fused.project
    trainer._compute_self_distillation_loss = fused.distillation_loss
    trainer._compute_policy_loss = fused.policy_loss
    trainer._compute_rollout_logps = fused.rollout_logprobs


class _FusedLoss:
    """The four functions of a trainer that make logits or take them."""

    def __init__(self, trainer: Any, max_scratch_bytes: int | None) -> None:
        self.trainer = trainer
        self.max_scratch_bytes = max_scratch_bytes
        config = trainer.model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def project(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
    ) -> Projection:
        """The last hidden states that predict the last `logits_to_keep` tokens, and the head."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if not isinstance(model, MixedTeacher):
            hidden_BTH, _ = self._forward(model, inputs)
            head = output_head(self.trainer.accelerator.unwrap_model(model))
            return Projection(hidden_BTH[:, -logits_to_keep - 1 : -1], head)
        if self.softcap is not None:
            raise UsageError(
                "trust_region mixes logits, and this model caps them: train it without "
                "use_fused_loss, or under another schedule"
            )
        # Both models' hidden states side by side against both heads side by side are the mixture.
        parts = [
            self.project(part, input_ids, attention_mask, logits_to_keep)
            for part in (model.initial, model.student)
        ]
        shares = 1 - model.share, model.share
        hidden = [share * part.hidden for share, part in zip(shares, parts, strict=True)]
        return Projection(torch.cat(hidden, -1), torch.cat([part.head for part in parts], 1))

    def distillation_loss(self, model: Any, inputs: Any, states: Any) -> Tensor:
        """The mean over sequences of the mean divergence of their tokens; `states` is TRL's
        DistillationLogits with `Projection`s in it."""
        trainer, args = self.trainer, self.trainer.args
        student, mask_BT = states.student_logits, states.loss_mask
        kept_BT = mask_BT.bool()
        old_BT, cap = inputs.get("old_per_token_logps"), args.distillation_is_clip
        off_policy = old_BT is not None and cap is not None
        mask_BT = mask_BT.to(_statistics_dtype(student))
        weight_BT = mask_BT / mask_BT.sum(-1, keepdim=True).clamp(min=1.0) / len(mask_BT)
        output = self._evaluate(
            student,
            states.teacher_logits,
            kept_BT,
            alpha=args.distillation_alpha,
            top_k=args.distillation_topk if args.distillation_mode == "topk_logits" else None,
            add_tail=args.distillation_add_tail,
            distill_weight=weight_BT[kept_BT],
            target_ids=states.completion_ids[kept_BT] if off_policy else None,
            old_logprob=old_BT[kept_BT] if off_policy else None,
            ratio_cap=cap if off_policy else None,
        )
        divergence_N = output.divergence
        if off_policy:
            ratio_N = (output.student_logprob - old_BT[kept_BT]).clamp(-20, 20).exp()
            divergence_N = divergence_N * ratio_N.clamp(max=cap)
        mean = divergence_N.sum() / mask_BT.sum().clamp(min=1.0)
        mode = "train" if model.training else "eval"
        trainer._log_self_distillation_metric(mode, trainer.accelerator.gather(mean).mean().item())
        return output.loss

    def policy_loss(self, inputs: Any, student: Projection) -> Tensor:
        """The clipped policy loss of SDPO, under each `loss_type`."""
        trainer = self.trainer
        mask_BT = inputs["completion_mask"].to(_statistics_dtype(student))
        kept_BT = mask_BT.bool()
        if trainer.loss_type == "grpo":
            count = mask_BT.sum(-1, keepdim=True).clamp(min=1.0) * len(mask_BT)
        elif trainer.loss_type == "dr_grpo":
            count = len(mask_BT) * trainer.max_completion_length
        else:  # bnpo and dapo
            count = mask_BT.sum().clamp(min=1.0)
        old_BT = inputs.get("old_per_token_logps")
        advantage_BT = inputs["advantages"].unsqueeze(1).expand_as(mask_BT)
        weight_N = (mask_BT / count)[kept_BT]
        output = self._evaluate(
            student,
            student,
            kept_BT,
            distill_weight=torch.zeros_like(weight_N),  # which leaves the teacher's side unread
            target_ids=inputs["completion_ids"][kept_BT],
            advantage=advantage_BT[kept_BT].to(weight_N.dtype),
            policy_weight=weight_N,
            old_logprob=None if old_BT is None else old_BT[kept_BT],
            clip_range=(trainer.epsilon_low, trainer.epsilon_high),
        )
        mode = "train" if trainer.model.training else "eval"
        loss = trainer.accelerator.gather(output.loss.detach()).mean().item()
        trainer._metrics[mode]["self_distillation/policy_loss"].append(loss)
        return output.loss

    @torch.no_grad()
    def rollout_logprobs(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
    ) -> Tensor | None:
        """Log-probs [B, T] of the sampled tokens, 0 outside of the answers; None where a step
        trains on its own answers alone, so that they are those that training computes."""
        args = self.trainer.args
        generate_every = args.steps_per_generation * args.num_iterations
        if args.gradient_accumulation_steps % generate_every == 0:
            return None
        student = self.project(
            self.trainer.model,
            torch.cat([prompt_ids, completion_ids], 1),
            torch.cat([prompt_mask, completion_mask], 1),
            completion_ids.shape[1],
        )
        kept_BT = completion_mask.bool()
        found_BT = torch.zeros(
            kept_BT.shape, dtype=_statistics_dtype(student), device=kept_BT.device
        )
        zeros_N = torch.zeros_like(found_BT[kept_BT])
        output = self._evaluate(
            student,
            student,
            kept_BT,
            distill_weight=zeros_N,
            target_ids=completion_ids[kept_BT],
            advantage=zeros_N,
            policy_weight=torch.ones_like(zeros_N),  # tokens without a weight have no statistics
        )
        assert output.student_logprob is not None
        found_BT[kept_BT] = output.student_logprob
        return found_BT

    def require_plain_head(self) -> None:
        """Raise `UsageError` unless the model's logits are hidden @ headᵀ, capped or not."""
        model = self.trainer.model
        name = type(model).__name__
        if "logits_to_keep" not in self.trainer.model_kwarg_keys:
            raise UsageError(f"{name} always makes all logits (its forward has no logits_to_keep)")
        # Not by its logits alone: a bias or an adapter that begins at zero is trained, too.
        if not _has_weights_alone(model.get_output_embeddings()):
            raise UsageError(
                f"{name}: its head has a bias or an adapter, which the fused loss would not train: "
                "give the head neither (LoRA has target_modules, and modules_to_save trains a "
                "whole head), or train without use_fused_loss"
            )
        ids = torch.arange(2, device=model.device).unsqueeze(0)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with torch.no_grad():
            hidden_BTH, expected_BV = self._forward(model, inputs)
            logits_BV = hidden_BTH[:, -1] @ output_head(model).to(hidden_BTH.dtype).T
        if self.softcap is not None:
            logits_BV = self.softcap * torch.tanh(logits_BV / self.softcap)
        tolerance = 1e-3 if logits_BV.dtype == torch.float32 else 2e-2
        if not torch.allclose(logits_BV.float(), expected_BV.float(), tolerance, tolerance):
            raise UsageError(
                f"{name}: its logits are not hidden states times output weights (it may scale "
                "them), which the fused loss needs: train it without"
            )

    def _forward(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Last hidden states [B, S, H] and the last token's logits [B, V].

        The whole model is called, so that whatever wraps it, such as DistributedDataParallel, sees
        the call, and asked for one token's logits.
        """
        found: list[Tensor] = []
        network = self.trainer.accelerator.unwrap_model(model)
        if hasattr(network, "get_base_model"):  # of PEFT, whose `base_model` is something else
            network = network.get_base_model()
        hook = network.base_model.register_forward_hook(
            lambda module, arguments, output: found.append(output.last_hidden_state)
        )
        try:
            logits_BTV = model(**inputs, logits_to_keep=1).logits
        finally:
            hook.remove()
        return found[-1], logits_BTV[:, -1]

    def _evaluate(
        self, student: Projection, teacher: Projection, kept_BT: Tensor, **objective: Any
    ) -> DistillationOutput:
        """The objective of the tokens that are kept, at the trainer's temperature. Under mixed
        precision hidden states and heads are cast as a linear layer's would be."""
        with self.trainer.accelerator.autocast():
            return linear_distillation_loss(
                student.hidden[kept_BT],
                student.head,
                teacher.hidden[kept_BT],
                teacher.head,
                temperature=self.trainer.temperature,
                softcap=self.softcap,
                max_scratch_bytes=self.max_scratch_bytes,
                **objective,
            )


def _has_weights_alone(head: Any) -> bool:
    """Whether a head is a linear layer without a bias. PEFT's wrapper of a layer that is trained
    whole, `modules_to_save`, counts as the copies of the layer that it holds."""
    copies = getattr(head, "modules_to_save", None)
    layers = [head] if copies is None else copies.values()
    return all(isinstance(layer, nn.Linear) and layer.bias is None for layer in layers)


def _statistics_dtype(states: Projection) -> torch.dtype:
    return torch.promote_types(states.hidden.dtype, torch.float32)
