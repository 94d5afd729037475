"""The model that is trained: loaded or the lab's own."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sodfast.config.types import Fraction, PathText, Positive, Section


class LoRAConfig(Section):
    """Low-rank adapters on frozen weights instead of full fine-tuning (arXiv 2106.09685)."""

    rank: Positive = 16
    alpha: Positive = 32  # an adapter's product is scaled by alpha / rank
    # Names of linear layers, such as q_proj; null: all of the decoder's. Embedding and head stay
    # frozen: the objective multiplies by the head's own weight.
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None


class ModelConfig(Section):
    path: PathText | None = None  # Hugging Face id or directory; None: the lab builds its own model
    # Instead of `path`: random weights, drawn from `seed`, of a shape named in configs/models.json,
    # and a tokenizer of bytes, without a directory or network; for measurements.
    random: str | None = None
    # Variables that the tokenizer's chat template is given for the student's prompts, beside
    # enable_thinking=false, which they may set to true.
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    # auto: the fastest attention that is installed; flash: FlashAttention, and no run without it.
    attention: Literal["auto", "flash"] = "auto"
    # The dtype of the weights; the teacher's weights and the gradients have the same one.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Keep only the input of each decoder layer, and run the layer again in the backward pass: less
    # memory, more time.
    gradient_checkpointing: bool = False
    # How many of the last layers keep all their activations nevertheless; auto: as many as fit into
    # memory_gib by `sodfast plan`. No number changes.
    kept_layers: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    # Liger's kernels for RMSNorm, RoPE and the gated MLP; auto: use them on a GPU where Liger
    # supports the model's architecture.
    liger: bool | Literal["auto"] = "auto"  # YAML reads on and off as true and false
    lora: LoRAConfig | None = None  # null: all weights are trained


class LabConfig(Section):
    """The lab's model, its misconceptions and its warm start (lab/warm_start.py)."""

    seed: int = Field(0, ge=0, lt=2**63)  # of the initial weights, the error tables, the batches
    hidden_size: int = Field(128, ge=8, le=16_384)
    layers: int = Field(3, ge=1, le=256)
    heads: int = Field(4, ge=1)
    intermediate_size: int = Field(384, ge=8, le=65_536)
    batches: int = Field(700, ge=1, le=10**6)  # supervised updates of the warm start ...
    rows: int = Field(6, ge=1, le=10**4)  # ... on so many packed rows each
    lr: float = Field(3e-3, gt=0, le=1)
    warmup_batches: int = Field(30, ge=1, le=10**6)
    demonstrated_fraction: float = Field(0.35, ge=0, le=1)  # examples that show a right solution
    # Lowest and highest probability that a product, or a sum, comes out wrong.
    product_error: tuple[Fraction, Fraction] = (0.05, 0.9)
    sum_error: tuple[Fraction, Fraction] = (0.0, 0.6)
    # Share of the wrong products, and of the wrong carries, that a demonstration does not cure.
    stubborn: float = Field(0.0, ge=0, le=1)
    error_decay: float = Field(0.8, gt=0, le=1)  # each later pass errs this much as often
    # Probabilities of 1, 2, 3 passes; a row of the warm start holds examples of at most 8.
    passes: Annotated[tuple[Fraction, ...], Field(min_length=1, max_length=8)] = (0.55, 0.35, 0.10)
    # This share of the examples has 1 to `long_passes` passes, each number equally likely.
    long_fraction: float = Field(0.05, ge=0, le=1)
    long_passes: int = Field(8, ge=1, le=8)

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
