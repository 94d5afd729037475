"""The whole configuration, typed: a preset or file, then dotted overrides, then validation.

Layers are read and merged by layers.py, whose names this module offers too, and checked here by
pydantic, so an unknown key, a wrong type and an impossible combination are all found before any
work.

Defaults follow Table 9 and Appendix A of the CGTR paper (arXiv 2606.03532) where it gives them.
"""

import json
import os
from collections.abc import Sequence
from string import Formatter
from typing import Annotated, Any, Literal, Union

import yaml
from omegaconf import DictConfig, OmegaConf
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sodfast.errors import UsageError
from sodfast.layers import BEFORE as BEFORE
from sodfast.layers import PRESETS as PRESETS
from sodfast.layers import RENAMED as RENAMED
from sodfast.layers import apply, explain, first_line, literal, read_layer, resolve
from sodfast.layers import parse_overrides as parse_overrides
from sodfast.layers import read_mapping as read_mapping
from sodfast.layers import read_overrides as read_overrides


def _warm_or_greedy(temperature: float) -> float:
    if 0 < temperature < _COLDEST:
        raise ValueError(f"must be 0 or at least {_COLDEST:g}")
    return temperature


def _names_a_file(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a character that no path may hold")
    return text


def _different(gates: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(gates)) != len(gates):
        raise ValueError("a gate is named twice")
    return gates


def _fits_a_file_system(text: str) -> str:
    names = text.encode().split(b"/")
    if len(text.encode()) > 4095 or max(map(len, names)) > 255:
        raise ValueError("is longer than a path may be")
    return text


def _names_an_object(source: str) -> str:
    """The file of `FILE.py:NAME` in full, so that a run can be resumed from any folder."""
    place, _, name = source.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError("must be FILE.py:NAME or module.submodule:NAME")
    return f"{os.path.abspath(place)}:{name}" if place.endswith(".py") else source


# Bounds beyond which a number is no use and its conversion to 32 bits fails in the middle of a run.
_MOST, _LARGEST, _COLDEST = 2**31 - 1, 1e9, 1e-6

Positive = Annotated[int, Field(ge=1, le=_MOST)]
Interval = Annotated[int, Field(ge=0, le=_MOST)]  # in steps; 0: never
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
TopP = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=_COLDEST, le=_LARGEST)]
NonNegative = Annotated[float, Field(ge=0, le=_LARGEST)]
AboveZero = Annotated[float, Field(gt=0, le=_LARGEST)]
Gibibytes = Annotated[float, Field(gt=0, le=1e6)]
NewPath = Annotated[str, AfterValidator(_names_a_file)]  # its length is the directory's business
PathText = Annotated[NewPath, AfterValidator(_fits_a_file_system)]
SourceText = Annotated[str, AfterValidator(_names_an_object)]  # of the user's own Python

# Pairs of model.dtype and optimizer.adamw that make no sense, and why.
_REFUSED_ADAMW = {
    ("float32", "exact"): "float32 weights are their own exact master; use fp32",
    ("float32", "plain"): "plain is torch's AdamW on bfloat16 weights; use torch",
    ("bfloat16", "torch"): (
        "rounded to nearest, bfloat16 weights lose most of a small update; use 8bit, fp32 or "
        "exact, or plain where that loss is the point"
    ),
}


class Section(BaseModel):
    """A group of keys: it cannot be changed, and refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
    chat_template_kwargs: dict[str, Any] = {}
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


# How responses are read: strict as the tasks' pages say, reference as lasgroup/SDPO does, so that
# scores compare.
Scorer = Literal["strict", "reference"]
Subject = Literal["biology", "chemistry", "material", "physics"]


class _TaskConfig(Section):
    # Strings that end a response, with the token that completes one, as an EOS token does.
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()


class ArithmeticConfig(_TaskConfig):
    """The lab's generated task; `train` and `test` count its questions."""

    name: Literal["arithmetic"] = "arithmetic"
    train: Positive = 1024
    test: Positive = 64


class SplitConfig(Section):
    """Names of the splits of a data set that are trained and tested on."""

    train: str = "train"
    test: str = "test"


class RowsConfig(_TaskConfig):
    """Questions from rows. `train` and `test` are JSONL files, folders or hub ids (`org/name` or
    `org/name:subset`); the last two need the package `datasets`, and without `test` they are split
    9:1."""

    train: PathText | None
    test: PathText | None = None
    # The split that `train` is read from (`test` then reads "test"), or one for each.
    split: str | SplitConfig | None = None
    columns: dict[str, str] = {}  # our names → the columns that hold them, {prompt: question}
    system: str | None = None  # the system message of every row; null: its own, "": none
    request: str | None = None  # stands below every prompt; null: the task's own, "": none


def _absolute(source: str | None) -> str | None:
    """A path on disk in full, so that a run can be resumed from any folder; a hub id as it is."""
    on_disk = source is not None and (source.endswith(".jsonl") or os.path.exists(source))
    return os.path.abspath(source) if source and on_disk else source


class _PlacedRowsConfig(RowsConfig):
    """Rows whose paths are kept in full. Those of 0.1.0's tasks are kept as they were given."""

    _in_full = field_validator("train", "test")(_absolute)


class MultipleChoiceConfig(RowsConfig):
    """A hub id must have the columns of SciKnowEval, unless `columns` says which it has; `subject`
    selects its domain. Folders and files have the fields `prompt` and `answer`."""

    name: Literal["multiple_choice"] = "multiple_choice"
    train: PathText
    scorer: Scorer = "strict"
    subject: Subject = "chemistry"


class ToolUseConfig(RowsConfig):
    name: Literal["tool_use"] = "tool_use"
    train: PathText
    scorer: Scorer = "strict"


class PythonConfig(_PlacedRowsConfig):
    """The user's own task: `source` is FILE.py:NAME or module:NAME. A class is built from `options`
    and brings its questions; a function scores the rows of `train` and `test`."""

    name: Literal["python"] = "python"
    source: SourceText
    train: PathText | None = None
    options: dict[str, Any] = {}
    timeout: AboveZero = 60.0  # seconds for a call


class MathConfig(_PlacedRowsConfig):
    """Rows whose `answer` is a number or LaTeX, compared by the package math-verify."""

    name: Literal["math"] = "math"
    train: PathText
    timeout: AboveZero = 10.0  # seconds for an answer


class SandboxConfig(Section):
    """What a model's programs are kept to (SECURITY.md)."""

    # namespaces: they see and reach nothing; rlimits: where the kernel allows no namespaces, they
    # are bounded in time, memory and output alone.
    isolation: Literal["namespaces", "rlimits"] = "namespaces"
    memory_mib: Positive = 512  # of each process, and of all together
    processes: Positive = 16  # at once, threads included


class CodeConfig(_PlacedRowsConfig):
    """Rows whose `tests` the model's program must pass, run in a sandbox."""

    name: Literal["code"] = "code"
    train: PathText
    timeout: AboveZero = 10.0  # seconds for all tests of an answer
    options: SandboxConfig = SandboxConfig()


TaskConfig = Annotated[
    Union[  # noqa: UP007
        ArithmeticConfig,
        MultipleChoiceConfig,
        ToolUseConfig,
        MathConfig,
        CodeConfig,
        PythonConfig,
    ],
    Field(discriminator="name"),
]


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
    dual_clip: Annotated[float, Field(gt=1, le=_LARGEST)] | None = None
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
    success_reward: Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)] = (
        0.5  # a rollout with at least this reward can be a demonstration
    )
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


class FixedConfig(Section):
    kind: Literal["fixed"] = "fixed"


class HardConfig(Section):
    kind: Literal["hard"] = "hard"
    every: Positive = 50


class EMAConfig(Section):
    kind: Literal["ema"] = "ema"
    rate: Fraction = 0.04


class TrustRegionConfig(Section):
    kind: Literal["trust_region"] = "trust_region"
    rate: Fraction = 0.04


class CGTRConfig(Section):
    """Consolidation-Gated Teacher Refresh; defaults of Table 9, arXiv 2606.03532."""

    kind: Literal["cgtr"] = "cgtr"
    min_isolation: Interval = 30
    check_every: Positive = 5
    window: Annotated[int, Field(ge=1, le=10_000)] = 5
    reward_margin: NonNegative = 0.05
    max_tail_ratio: AboveZero = 3.2
    gates: tuple[Literal["isolation", "reward", "length"], ...] = ("isolation", "reward", "length")
    length_unit: Literal["sequence", "shard"] = "sequence"
    shards: Positive = 4  # length_unit=shard: groups of sequences whose lengths are summed

    @property
    def length_shards(self) -> int | None:
        """Groups of sequences whose summed lengths the length gate sees; None: sequences."""
        return self.shards if self.length_unit == "shard" else None

    _gates_differ = field_validator("gates")(_different)


class EvidenceConfig(Section):
    """Refresh where the copy would be the better teacher, as measured by a probe of both.

    A probe answers `probe_questions` of the step's prompts, `probe_samples` times each, with the
    student's and with the teacher's weights; a decision looks at the last `probes` of them.
    """

    kind: Literal["evidence"] = "evidence"
    min_isolation: Interval = 30
    probe_every: Positive = 2
    probe_questions: Positive = 16
    probe_samples: Positive = 4
    probes: Annotated[int, Field(ge=1, le=10_000)] = 10
    # Of the paired rewards. 2.9: a refresh without a gain in 10 % of runs of 300 steps; `sodfast
    # calibrate` has the limit for another rate.
    min_z: Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)] = 2.9
    max_length_ratio: AboveZero = 1.15  # mean answer of the copy / of the teacher as it is
    max_tail_growth: AboveZero = 1.25  # longest 5 % / mean of the rollouts, against the opening
    gates: tuple[Literal["isolation", "reward", "length", "tail"], ...] = (
        "isolation",
        "reward",
        "length",
        "tail",
    )

    _gates_differ = field_validator("gates")(_different)


class PythonScheduleConfig(Section):
    """The user's own schedule: `source`, FILE.py:NAME or module:NAME, is a class that is built from
    `options` and has `observe(statistics) -> Decision`."""

    kind: Literal["python"] = "python"
    source: SourceText
    options: dict[str, Any] = {}


ScheduleConfig = Annotated[
    Union[  # noqa: UP007
        FixedConfig,
        HardConfig,
        EMAConfig,
        CGTRConfig,
        EvidenceConfig,
        TrustRegionConfig,
        PythonScheduleConfig,
    ],
    Field(discriminator="kind"),
]


def gate_names(schedule: ScheduleConfig) -> tuple[str, ...]:
    """The gates of a schedule's checks, those that are switched off included; none where it has
    no checks."""
    return type(schedule)().gates if isinstance(schedule, CGTRConfig | EvidenceConfig) else ()


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
    warmup_steps: Annotated[int, Field(ge=0, le=_MOST)] = 10
    lr_burst: BurstConfig | None = None  # drift that passes: {first: 96, last: 100, factor: 8}
    weight_decay: NonNegative = 0.01
    clip_norm: AboveZero = 1.0
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Annotated[float, Field(ge=1e-30, le=_LARGEST)] = 1e-8
    # Which AdamW. torch: torch's, on float32 weights. 8bit, fp32: the fused one, with moments of
    # that size, which rounds bfloat16 weights stochastically. exact: fp32 moments and, beside
    # bfloat16 weights, the 16 bits that make them fp32. plain: torch's on bfloat16 weights, a
    # negative control. auto: torch for float32, 8bit for bfloat16. LoRA's adapters are float32.
    adamw: Literal["auto", "torch", "8bit", "fp32", "exact", "plain"] = "auto"
    updates_per_step: Positive = 1
    micro_batch_tokens: Positive = 16_384  # of one forward and backward pass, prompts included


class EvalConfig(Section):
    every: Interval = 10  # 0: no evaluation, neither of the untrained student nor at the end
    samples: Positive = 16
    # 0: greedy
    temperature: Annotated[NonNegative, AfterValidator(_warm_or_greedy)] = 0.6
    top_p: TopP = 0.95
    top_k: Positive | None = None
    questions: Positive | None = None  # of each test, evenly spaced; null: all
    # Other tasks whose tests are asked beside the run's own; metrics eval/<name>/mean@k.
    tasks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")], TaskConfig] = {}
    # The same random numbers in every evaluation, so that two of them differ where the student
    # does; false: fresh ones at each step.
    common_draws: bool = True


class CheckpointConfig(Section):
    # 0: no checkpoint but those of `at`, also not at the end or when interrupted; a run without one
    # starts over when it is resumed.
    every: Interval = 25
    keep: Positive = 2
    # Also save, and never delete, the checkpoints of these steps, so that they can be forked.
    at: tuple[Interval, ...] = ()
    # Also save, and never delete, the checkpoint of the evaluation with the highest mean@k so far.
    best: bool = False


class CollapseConfig(Section):
    """When a run counts as collapsed; the paper leaves it undefined, these are our readings."""

    stop: bool = False
    length_fraction: Fraction = 0.9  # mean length / cap that counts as runaway ...
    length_steps: Positive = 5  # ... when it lasts this many steps in a row
    eval_floor: float = 0.01  # test mean@k below this, or below ...
    eval_fraction: Fraction = 0.1  # ... this share of the best so far


class LogConfig(Section):
    """What is written beside metrics.jsonl, which always is: sinks, and answers in samples/."""

    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    project: str = "sodfast"
    # Every how many steps all answers go to samples/; null: where the run is evaluated; 0: never.
    # Those of an evaluation are kept unless it is 0.
    samples_every: Interval | None = None


class Config(Section):
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    out: NewPath | None = None  # the run directory itself; None: a new folder under runs/
    steps: Positive = 150
    threads: Positive | None = None  # CPU threads of the run; None: torch's choice
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,2})?)$")] = "auto"
    # What a GPU's allocator may hand out, GiB; null: all of it. `sodfast plan` then assumes 78.
    memory_gib: Gibibytes | None = None
    model: ModelConfig = ModelConfig()
    lab: LabConfig = LabConfig()
    task: TaskConfig = ArithmeticConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    teacher: TeacherConfig = TeacherConfig()
    schedule: ScheduleConfig = CGTRConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    collapse: CollapseConfig = CollapseConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> "Config":
        prompts, samples = self.rollout.prompts_per_step, self.rollout.samples_per_prompt
        if prompts % self.optimizer.updates_per_step:
            raise ValueError(
                f"optimizer.updates_per_step={self.optimizer.updates_per_step} must divide "
                f"rollout.prompts_per_step={prompts}"
            )
        alone = samples < 2 and not self.teacher.demonstrate_self
        if self.teacher.context == "demonstration" and alone:
            raise ValueError(
                "rollout.samples_per_prompt must be at least 2 with teacher.context=demonstration "
                "(a demonstration is a sibling's rollout); raise it or set teacher.context=none"
            )
        if self.teacher.feedback != "never" and self.teacher.context in ("feedback", "none"):
            shown = "feedback" if self.teacher.context == "feedback" else "no hint"
            raise ValueError(
                f"teacher.feedback={self.teacher.feedback} adds feedback to a solution, and "
                f"teacher.context={self.teacher.context} shows {shown} alone: set "
                "teacher.feedback=never, or teacher.context=demonstration"
            )
        if self.length_shards and prompts * samples % self.length_shards:
            raise ValueError(
                f"schedule.shards={self.length_shards} must divide the {prompts * samples} "
                "rollouts of a step"
            )
        lora = self.model.lora is not None
        trained = "float32" if lora else self.model.dtype
        refused = _REFUSED_ADAMW.get((trained, self.optimizer.adamw))
        if refused:
            raise ValueError(
                f"optimizer.adamw={self.optimizer.adamw} does not go with "
                f"{'the adapters of model.lora' if lora else f'model.dtype={trained}'}: {refused}"
            )
        if lora and self.teacher.storage == "host":
            raise ValueError(
                "teacher.storage=host does not go with model.lora, whose teacher is a few adapters "
                "on the student's own base: set teacher.storage=device"
            )
        if lora and self.rollout.engine == "vllm":
            raise ValueError(
                "rollout.engine=vllm does not go with model.lora, since it copies plain weights: "
                "set rollout.engine to native or hf"
            )
        if self.model.path is not None and self.model.random is not None:
            raise ValueError(
                "model.path and model.random exclude each other: leave one of them out"
            )
        kept = self.model.kept_layers
        recomputed = self.model.gradient_checkpointing
        if kept not in (0, "auto") and not recomputed:
            raise ValueError(
                f"model.kept_layers={kept} needs model.gradient_checkpointing=true, without which "
                "every layer keeps its activations"
            )
        if kept == "auto" and recomputed and self.memory_gib is None:
            raise ValueError(
                "model.kept_layers=auto needs memory_gib, which says how much memory there is"
            )
        if kept == "auto" and recomputed and self.rollout.engine == "vllm":
            raise ValueError(
                "model.kept_layers=auto does not go with rollout.engine=vllm, whose memory is not "
                "planned: set model.kept_layers to a number"
            )
        if not (0 <= self.collapse.eval_floor <= 1 or isinstance(self.task, PythonConfig)):
            raise ValueError(
                f"collapse.eval_floor: {self.collapse.eval_floor} must lie in [0, 1], as the "
                f"rewards of task.name={self.task.name} do"
            )
        return self

    @model_validator(mode="after")
    def _tasks_fit_the_model(self) -> "Config":
        own = self.model.path is None and self.model.random is None
        others = {f"eval.tasks.{name}": task for name, task in self.eval.tasks.items()}
        for key, task in {"task": self.task, **others}.items():
            if own and not isinstance(task, ArithmeticConfig | PythonConfig):
                raise ValueError(
                    f"{key}.name={task.name} needs a model: set model.path (the lab's own model "
                    "only knows task.name=arithmetic)"
                )
        return self

    @model_validator(mode="after")
    def _the_best_is_known(self) -> "Config":
        if self.checkpoint.best and not (self.checkpoint.every and self.eval.every):
            raise ValueError(
                "checkpoint.best=true needs checkpoints and evaluations: set checkpoint.every and "
                "eval.every above 0"
            )
        return self

    @property
    def length_shards(self) -> int | None:
        """See `CGTRConfig`; None for the other schedules."""
        return self.schedule.length_shards if isinstance(self.schedule, CGTRConfig) else None

    def to_layer(self) -> dict[str, Any]:
        """All values, as a layer that means the same wherever and whenever it is read."""
        layer: dict[str, Any] = literal(self.model_dump(mode="json"))
        return layer

    @property
    def scoring_tokens(self) -> int:
        """Tokens of one scoring pass of the teacher at most, prompts included."""
        return self.teacher.micro_batch_tokens or self.optimizer.micro_batch_tokens

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_layer(), sort_keys=False, allow_unicode=True)


def load_config(
    source: str | os.PathLike[str] | None = None, overrides: Sequence[str] = (), **values: Any
) -> Config:
    """Read a preset's name or a YAML file (None: the preset `lab`), apply `key=value` overrides.

    `values` are overrides that are Python values already; of a group given as a mapping, such as
    `eval={"every": 5}`, only the keys that it names are set.

    Raises `UsageError` with one line for a missing, empty or malformed source, an override
    without `=`, an unknown key or a value that its key does not take.
    """
    return validate(apply(overrides, read_layer(os.fspath(source or "lab")), values))


def validate(layer: DictConfig | dict[str, Any]) -> Config:
    """Check a merged layer; raises `UsageError` naming each key that is wrong."""
    values = resolve(layer)
    try:
        # Validation goes through JSON, since pydantic's strict mode then takes a list for a tuple
        # and still refuses "5" for 5. No field that holds a tuple may have a "before" validator:
        # pydantic checks what one returns as Python values, and there strict mode refuses a list.
        return Config.model_validate_json(json.dumps(values), strict=True)
    except (TypeError, RecursionError) as error:
        raise UsageError(f"configuration: {first_line(error)}") from error
    except ValidationError as error:
        reasons = [explain(Config, item) for item in error.errors()]
        more = [f"and {len(reasons) - 20} more"] if len(reasons) > 20 else []
        raise UsageError("; ".join([*reasons[:20], *more])) from error


def override(config: Config, overrides: list[str]) -> Config:
    """`config` with `key=value` texts applied; raises `UsageError` as `load_config` does."""
    return validate(apply(overrides, OmegaConf.create(config.to_layer())))
