"""A step of training: rollouts, the objective, what the teacher is shown, the optimizer."""

from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from sodfast.config.types import (
    LARGEST,
    AboveZero,
    Count,
    Decay,
    Fraction,
    Gibibytes,
    NonNegative,
    Number,
    Positive,
    Section,
    Temperature,
    TopP,
)


class RolloutConfig(Section):
    prompts_per_step: Positive = 16
    samples_per_prompt: Positive = 4
    max_prompt_tokens: Positive = 2048  # longer prompts are dropped and counted
    max_new_tokens: Positive = 8192
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: Positive | None = None
    engine: Literal["auto", "native", "hf", "vllm"] = "auto"  # auto: native where it can
    batch_size: Positive = 256  # sequences decoded at once, at most
    # Key-value cache of native and vllm, GiB; null: a share of the free memory. A short budget
    # makes rollouts slower, never shorter.
    cache_gib: Gibibytes | None = None
    # Drafts of the next tokens that native checks in one pass, at most K for each sequence; off:
    # none; auto: on a CPU as many as pay by load and by how many held so far, on a GPU none. No
    # answer depends on it but, on a GPU, by rounding.
    speculate: Literal["auto", False, 1, 3, 7, 15] = "auto"  # YAML reads off as false


class ObjectiveConfig(Section):
    alpha: Fraction = 0.5  # 0 forward KL, 1 reverse KL, between: generalised Jensen-Shannon
    top_k: Positive | None = None
    add_tail: bool = True
    distill_coef: NonNegative = 1.0
    policy_coef: NonNegative = 1.0
    ratio_cap: AboveZero | None = 2.0
    clip_range: tuple[NonNegative, NonNegative] = (0.2, 0.28)
    # c: bounds the policy loss of a token with a negative advantage A by c·|A| (arXiv 1912.09729).
    dual_clip: Annotated[float, Field(gt=1, le=LARGEST)] | None = None
    # π_old of the policy term and of the ratio cap: as the engine sampled, or recomputed by the
    # forward pass that trains; the difference then counts as the sampler's (importance weight).
    old_logprob: Literal["engine", "recompute"] = "engine"
    normalize_advantage: bool = False  # divide the group's advantages by their std
    reduction: Literal["sequence_mean", "token_mean"] = "sequence_mean"


def _feedback_word(value: Any) -> Any:
    return {False: "never", True: "always"}[value] if isinstance(value, bool) else value


class TeacherConfig(Section):
    """What the teacher sees and where it lives (arXiv 2601.20802: privileged context)."""

    # The hint. demonstration: a right answer of a sibling; reference: the row's own solution, its
    # field `solution` or else `answer`; demonstration_or_reference: the row's where no sibling is
    # right; feedback: the task's words on this very answer; none: nothing.
    context: Literal[
        "demonstration", "reference", "demonstration_or_reference", "feedback", "none"
    ] = "demonstration"
    storage: Literal["device", "host"] = "device"  # host: streamed layer by layer to the device
    # A rollout with at least this reward can be a demonstration.
    success_reward: Number = 0.5
    demonstrate_self: bool = False  # whether a right answer can be a hint for itself
    # Whether the task's words on a rollout are shown beside a solution, only where there is none,
    # or never. Release 0.1.0 wrote false for never and true for always.
    feedback: Annotated[
        Literal["never", "without_solution", "always"], BeforeValidator(_feedback_word)
    ] = "never"
    # As model.chat_template_kwargs, for the teacher's prompts; null: the student's.
    chat_template_kwargs: dict[str, Any] | None = None
    max_prompt_tokens: Positive = 10_240  # longer: the solution is cut, and then the feedback
    # Tokens that are scored at a time, prompts included; null: optimizer.micro_batch_tokens. With
    # storage=host each such pass streams the weights once. Where a pass has other sequences, matrix
    # products have other shapes, and numbers may differ in their last bits.
    micro_batch_tokens: Positive | None = None
    template: str = (
        "{prompt}\n\n{demonstration}{feedback}"
        "Using what is shown above, answer the original question yourself."
    )
    demonstration_template: str = "Here is a correct solution:\n\n{demonstration}\n\n"
    feedback_template: str = "Feedback on an earlier attempt:\n\n{feedback}\n\n"

    @field_validator("template", "demonstration_template", "feedback_template")
    @classmethod
    def _fields_are_named(cls, template: str, info: ValidationInfo) -> str:
        name = str(info.field_name).removesuffix("_template")
        required = {"prompt", "demonstration", "feedback"} if name == "template" else {name}
        parsed = Formatter().parse(template)
        fields = {tuple(field) for _, *field in parsed if field[0] is not None}
        if fields != {(name, "", None) for name in required}:
            wanted = ", ".join("{" + name + "}" for name in sorted(required))
            raise ValueError(f"must contain exactly the fields {wanted}")
        return template


class BurstConfig(Section):
    """Steps `first` to `last` train at `factor` times the learning rate."""

    first: Positive
    last: Positive
    factor: NonNegative

    @model_validator(mode="after")
    def _ordered(self) -> "BurstConfig":
        if self.first > self.last:
            raise ValueError(f"optimizer.lr_burst: first={self.first} comes after last={self.last}")
        return self


class OptimizerConfig(Section):
    lr: Annotated[float, Field(ge=0, le=1e38)] = 1e-5
    warmup_steps: Count = 10
    lr_burst: BurstConfig | None = None  # drift that passes: {first: 96, last: 100, factor: 8}
    weight_decay: NonNegative = 0.01
    clip_norm: AboveZero = 1.0
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Annotated[float, Field(ge=1e-30, le=LARGEST)] = 1e-8
    # Which AdamW. torch: torch's, on float32 weights. 8bit, fp32: the fused one, with moments of
    # that size, which rounds bfloat16 weights stochastically. exact: fp32 moments and, beside
    # bfloat16 weights, the 16 bits that make them fp32. plain: torch's on bfloat16 weights, a
    # negative control. auto: torch for float32, 8bit for bfloat16. LoRA's adapters are float32.
    adamw: Literal["auto", "torch", "8bit", "fp32", "exact", "plain"] = "auto"
    updates_per_step: Positive = 1
    micro_batch_tokens: Positive = 16_384  # of one forward and backward pass, prompts included
