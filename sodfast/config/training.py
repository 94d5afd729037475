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
    """Questions that each step asks."""
    samples_per_prompt: Positive = 4
    """Answers that the student samples to each question of a step: its group."""
    max_prompt_tokens: Positive = 2048
    """Tokens of a prompt at most; longer ones are dropped before the run and counted."""
    max_new_tokens: Positive = 8192
    """Tokens of an answer at most; one that reaches this length is cut and counts as capped."""
    temperature: Temperature = 1.0
    """What logits are divided by before sampling, and before teacher and student are compared."""
    top_p: TopP = 1.0
    """Sample from the likeliest tokens that together have this probability; 1: from all."""
    top_k: Positive | None = None
    """Sample from this many likeliest tokens; null: from all."""
    engine: Literal["auto", "native", "hf", "vllm"] = "auto"
    """What generates: sodfast's own engine, transformers' `generate`, or vLLM; auto takes native
    where the model's architecture allows it, and hf elsewhere."""
    batch_size: Positive = 256
    """Sequences that are decoded at once, at most."""
    cache_gib: Gibibytes | None = None
    """Size of the key-value cache of native and vllm in GiB, where a small one makes rollouts
    slower and never shorter; null: a share of the free memory."""
    speculate: Literal["auto", False, 1, 3, 7, 15] = "auto"
    """Drafts of the next tokens that native checks in one pass, at most so many for each sequence,
    on which no answer depends but, on a GPU, by rounding; off (false): none; auto: on a CPU as many
    as pay by load and by how many held so far, on a GPU none."""


class ObjectiveConfig(Section):
    alpha: Fraction = 0.5
    """Which divergence: 0 is the forward KL, 1 the reverse KL, between them the generalised
    Jensen-Shannon divergence."""
    top_k: Positive | None = None
    """Compare only the student's so many likeliest tokens; null: the whole vocabulary."""
    add_tail: bool = True
    """With `top_k`, whether all other tokens together count as one more."""
    distill_coef: NonNegative = 1.0
    """Factor of the divergence from the teacher in the loss; 0 leaves it out, and the teacher is
    then not run."""
    policy_coef: NonNegative = 1.0
    """Factor of the clipped policy gradient in the loss; 0 leaves it out."""
    ratio_cap: AboveZero | None = 2.0
    """Bound of the likelihood ratio π/π_old by which a token's divergence is weighted; null: the
    divergence is not weighted."""
    clip_range: tuple[NonNegative, NonNegative] = (0.2, 0.28)
    """Lower and upper ε of the policy gradient, whose likelihood ratio is clipped to [1 − lower, 1
    + upper]."""
    dual_clip: Annotated[float, Field(gt=1, le=LARGEST)] | None = None
    """The c that bounds the policy loss of a token with a negative advantage A by c·|A| (arXiv
    1912.09729), usually 3; null: unbounded."""
    old_logprob: Literal["engine", "recompute"] = "engine"
    """Where π_old of the policy gradient and of the ratio cap comes from: as the engine sampled, or
    recomputed by the forward pass that trains, where the difference then counts as the sampler's
    (importance weight)."""
    normalize_advantage: bool = False
    """Whether advantages are divided by the standard deviation of their group's rewards (GRPO)."""
    reduction: Literal["sequence_mean", "token_mean"] = "sequence_mean"
    """Whether every answer weighs the same in an update, or every token does."""


def _feedback_word(value: Any) -> Any:
    return {False: "never", True: "always"}[value] if isinstance(value, bool) else value


class TeacherConfig(Section):
    """What the teacher sees and where it lives (arXiv 2601.20802: privileged context)."""

    context: Literal[
        "demonstration", "reference", "demonstration_or_reference", "feedback", "none"
    ] = "demonstration"
    """The hint in the teacher's prompt: a right answer of a sibling, the row's own solution (its
    field `solution` or else `answer`), the row's where no sibling is right, the task's words on
    this very answer, or nothing."""
    storage: Literal["device", "host"] = "device"
    """Where the teacher's weights lie; from host they are streamed to the device layer by layer."""
    success_reward: Number = 0.5
    """The reward from which on an answer counts as right and can be a demonstration."""
    demonstrate_self: bool = False
    """Whether a right answer can be a hint for itself."""
    feedback: Annotated[
        Literal["never", "without_solution", "always"], BeforeValidator(_feedback_word)
    ] = "never"
    """When the task's words on an answer are added to the hint; false and true, as release 0.1.0
    wrote, are read as never and always."""
    chat_template_kwargs: dict[str, Any] | None = None
    """As `model.chat_template_kwargs`, for the teacher's prompts; null: the student's."""
    max_prompt_tokens: Positive = 10_240
    """Tokens of the teacher's prompt at most; of a longer one the solution is cut at its end, and
    then the feedback."""
    micro_batch_tokens: Positive | None = None
    """Tokens that the teacher scores in one pass, prompts included, each of which streams the
    weights once with storage=host; results may depend on it in their last bits; null:
    `optimizer.micro_batch_tokens`."""
    template: str = (
        "{prompt}\n\n{demonstration}{feedback}"
        "Using what is shown above, answer the original question yourself."
    )
    """The user's message to the teacher, with the fields `{prompt}`, `{demonstration}` and
    `{feedback}`, of which the last two are filled by the templates below, or empty."""
    demonstration_template: str = "Here is a correct solution:\n\n{demonstration}\n\n"
    """The part of a solution in the teacher's message, with the field `{demonstration}`."""
    feedback_template: str = "Feedback on an earlier attempt:\n\n{feedback}\n\n"
    """The part of the task's words in the teacher's message, with the field `{feedback}`."""

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
    first: Positive
    """First step of the burst."""
    last: Positive
    """Last step of the burst."""
    factor: NonNegative
    """What the learning rate is multiplied by in these steps."""

    @model_validator(mode="after")
    def _ordered(self) -> "BurstConfig":
        if self.first > self.last:
            raise ValueError(f"optimizer.lr_burst: first={self.first} comes after last={self.last}")
        return self


class OptimizerConfig(Section):
    lr: Annotated[float, Field(ge=0, le=1e38)] = 1e-5
    """Learning rate after the warm-up."""
    warmup_steps: Count = 10
    """Steps over which the learning rate rises linearly to `lr`."""
    lr_burst: BurstConfig | None = None
    """Steps with another learning rate, to provoke drift that passes, such as `{first: 96, last:
    100, factor: 8}`; null: none."""
    weight_decay: NonNegative = 0.01
    """AdamW's decoupled weight decay."""
    clip_norm: AboveZero = 1.0
    """Largest norm of an update's whole gradient; a larger gradient is scaled down to it."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay rates of the first and the second moment."""
    eps: Annotated[float, Field(ge=1e-30, le=LARGEST)] = 1e-8
    """What AdamW adds to the root of the second moment."""
    adamw: Literal["auto", "torch", "8bit", "fp32", "exact", "plain"] = "auto"
    """Which AdamW: torch's on float32 weights; the fused one with moments of 8 bits or fp32, which
    rounds bfloat16 weights stochastically; exact, fp32 moments and the 16 bits that make bfloat16
    weights fp32; plain, torch's on bfloat16 weights, a negative control; auto is torch for float32
    weights, among them LoRA's adapters, and 8bit for bfloat16."""
    updates_per_step: Positive = 1
    """Optimizer updates of a step, each on an equal part of its questions."""
    micro_batch_tokens: Positive = 16_384
    """Tokens of one forward and backward pass, prompts included."""
