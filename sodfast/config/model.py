"""The model that is trained: loaded or the lab's own."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sodfast.config.types import Fraction, PathText, Positive, Section


class LoRAConfig(Section):
    rank: Positive = 16
    """Rank of each adapter."""
    alpha: Positive = 32
    """An adapter's product is scaled by alpha / rank."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of the linear layers that get an adapter, such as `q_proj`; embedding and head stay
    frozen, since the objective multiplies by the head's own weight; null: all of the decoder's."""


class ModelConfig(Section):
    path: PathText | None = None
    """Hugging Face id or directory of the model, whose remote code never runs; null: the lab builds
    its own."""
    random: str | None = None
    """Instead of `path`, for measurements: the name, in sodfast/configs/models.json, of a shape
    that gets random weights, drawn from `seed`, and a tokenizer of bytes, without a directory or
    network."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables that the tokenizer's chat template is given for the student's prompts, beside
    enable_thinking=false, which they may set to true."""
    attention: Literal["auto", "flash"] = "auto"
    """Which attention on packed sequences: the fastest that is installed, or FlashAttention and no
    run without it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights, the teacher's too, and of the gradients."""
    gradient_checkpointing: bool = False
    """Whether only the input of each decoder layer is kept, and the layer run again in the backward
    pass, for less memory and more time."""
    kept_layers: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """With gradient_checkpointing, how many of the last layers keep all their activations
    nevertheless, which changes no number; auto: as many as fit into `memory_gib` by `sodfast
    plan`."""
    liger: bool | Literal["auto"] = "auto"
    """Whether Liger's kernels compute RMSNorm, RoPE and the gated MLP; auto: on a GPU where Liger
    supports the model's architecture."""
    lora: LoRAConfig | None = None
    """Low-rank adapters on frozen weights instead of full fine-tuning (arXiv 2106.09685); null: all
    weights are trained."""


class LabConfig(Section):
    """The lab's model, its misconceptions and its warm start (lab/warm_start.py)."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights, the misconceptions and the warm start's batches."""
    hidden_size: int = Field(128, ge=8, le=16_384)
    """Width of the lab's model."""
    layers: int = Field(3, ge=1, le=256)
    """Decoder layers of the lab's model."""
    heads: int = Field(4, ge=1)
    """Attention heads, which divide the width into heads of an even size."""
    intermediate_size: int = Field(384, ge=8, le=65_536)
    """Width of the gated MLP."""
    batches: int = Field(700, ge=1, le=10**6)
    """Supervised updates of the warm start."""
    rows: int = Field(6, ge=1, le=10**4)
    """Packed rows of each of these updates."""
    lr: float = Field(3e-3, gt=0, le=1)
    """The warm start's highest learning rate."""
    warmup_batches: int = Field(30, ge=1, le=10**6)
    """Updates over which the warm start's learning rate rises to its highest."""
    demonstrated_fraction: float = Field(0.35, ge=0, le=1)
    """Share of the warm start's examples that show a right solution before the question."""
    product_error: tuple[Fraction, Fraction] = (0.05, 0.9)
    """Lowest and highest probability that a product comes out wrong."""
    sum_error: tuple[Fraction, Fraction] = (0.0, 0.6)
    """Lowest and highest probability that a carry comes out wrong."""
    stubborn: float = Field(0.0, ge=0, le=1)
    """Share of the wrong products, and of the wrong carries, that a demonstration does not cure."""
    error_decay: float = Field(0.8, gt=0, le=1)
    """Each later pass of an answer errs this much as often as the one before."""
    passes: Annotated[tuple[Fraction, ...], Field(min_length=1, max_length=8)] = (0.55, 0.35, 0.10)
    """Probabilities that an answer has 1, 2, 3, … passes, which add up to 1."""
    long_fraction: float = Field(0.05, ge=0, le=1)
    """Share of the examples that have 1 to `long_passes` passes, each number equally likely."""
    long_passes: int = Field(8, ge=1, le=8)
    """Passes of these long examples, at most."""

    @field_validator("passes")
    @classmethod
    def _passes_are_a_distribution(cls, passes: tuple[float, ...]) -> tuple[float, ...]:
        if abs(sum(passes) - 1) > 1e-6 or passes[-1] == 0:
            raise ValueError("must add up to 1, the last being above 0")
        return passes

    @model_validator(mode="after")
    def _heads_can_be_rotated(self) -> "LabConfig":
        size = self.hidden_size // self.heads
        if size < 2 or size % 2:
            raise ValueError(
                f"lab.heads={self.heads} must divide lab.hidden_size={self.hidden_size} into heads "
                "of an even size"
            )
        return self
