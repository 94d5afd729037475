"""The whole configuration, typed: a preset or file, then dotted overrides, then validation.

A file may be built on another: its key `base` names the preset or file (from its own folder) whose
values hold where it gives none. Layers are merged by OmegaConf and checked by pydantic, so an
unknown key, a wrong type and an impossible combination are all found before any work. Two groups
are unions told apart by a key: `schedule` by `kind` and `task` by `name`. A layer that changes that
key starts the group afresh, because the keys of one kind mean nothing to another.

Defaults follow Table 9 and Appendix A of the CGTR paper (arXiv 2606.03532) where it gives them.
"""

import difflib
import io
import json
import logging
import os
import re
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, Union, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sodfast.errors import UsageError

_log = logging.getLogger(__name__)

PRESETS = Path(__file__).parent / "configs"
# Keys of earlier releases, each accepted for one release after it was renamed.
RENAMED = {"optimizer.state": "optimizer.adamw"}
# What earlier releases did where a key of today was not there yet and its default is something
# else: a run that they began goes on as it was.
BEFORE = {"eval.common_draws": False}
# Groups that are unions, the key that tells their members apart, and its value where it is absent.
_DISCRIMINATORS = {"schedule": ("kind", "cgtr"), "task": ("name", "arithmetic")}


def _warm_or_greedy(temperature: float) -> float:
    if 0 < temperature < _COLDEST:
        raise ValueError(f"must be 0 or at least {_COLDEST:g}")
    return temperature


def _names_a_file(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a character that no path may hold")
    return text


def _fits_a_file_system(text: str) -> str:
    names = text.encode().split(b"/")
    if len(text.encode()) > 4095 or max(map(len, names)) > 255:
        raise ValueError("is longer than a path may be")
    return text


# Bounds beyond which a number is no use and its conversion to 32 bits fails in the middle of a run.
_MOST, _LARGEST, _COLDEST = 2**31 - 1, 1e9, 1e-6
# What a YAML text may hold. libyaml ends the process where nesting exhausts its stack.
_DEEPEST, _MOST_INTERPOLATIONS = 100, 1000
_KEY = re.compile(r"[^.\[\]]+(\.[^.\[\]]+){0,7}")  # of an override

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
    source: str
    train: PathText | None = None
    options: dict[str, Any] = {}
    timeout: Annotated[float, Field(gt=0)] = 60.0  # seconds for a call

    @field_validator("source")
    @classmethod
    def _names_an_object(cls, source: str) -> str:
        place, _, name = source.rpartition(":")
        if not place or not name.isidentifier():
            raise ValueError("must be FILE.py:NAME or module.submodule:NAME")
        return f"{os.path.abspath(place)}:{name}" if place.endswith(".py") else source


class MathConfig(_PlacedRowsConfig):
    """Rows whose `answer` is a number or LaTeX, compared by the package math-verify."""

    name: Literal["math"] = "math"
    train: PathText
    timeout: Annotated[float, Field(gt=0)] = 10.0  # seconds for an answer


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
    timeout: Annotated[float, Field(gt=0)] = 10.0  # seconds for all tests of an answer
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
    normalize_advantage: bool = False  # divide the group's advantages by their std
    reduction: Literal["sequence_mean", "token_mean"] = "sequence_mean"


class TeacherConfig(Section):
    """What the teacher sees and where it lives (arXiv 2601.20802: privileged context)."""

    context: Literal["demonstration", "none"] = "demonstration"
    storage: Literal["device", "host"] = "device"  # host: streamed layer by layer to the device
    success_reward: Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)] = (
        0.5  # a rollout with at least this reward can be a demonstration
    )
    feedback: bool = False  # show the teacher the task's feedback on this rollout, too
    max_prompt_tokens: Positive = 10_240  # longer: the demonstration is cut
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

    @field_validator("gates")
    @classmethod
    def _gates_differ(cls, gates: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(gates)) != len(gates):
            raise ValueError("a gate is named twice")
        return gates


ScheduleConfig = Annotated[
    Union[FixedConfig, HardConfig, EMAConfig, CGTRConfig, TrustRegionConfig],  # noqa: UP007
    Field(discriminator="kind"),
]


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
    # The same random numbers in every evaluation, so that two of them differ where the student
    # does; false: fresh ones at each step.
    common_draws: bool = True


class CheckpointConfig(Section):
    # 0: no checkpoint, also not at the end or when interrupted; a resumed run then starts over.
    every: Interval = 25
    keep: Positive = 2


class CollapseConfig(Section):
    """When a run counts as collapsed; the paper leaves it undefined, these are our readings."""

    stop: bool = False
    length_fraction: Fraction = 0.9  # mean length / cap that counts as runaway ...
    length_steps: Positive = 5  # ... when it lasts this many steps in a row
    eval_floor: float = 0.01  # test mean@k below this, or below ...
    eval_fraction: Fraction = 0.1  # ... this share of the best so far


class LogConfig(Section):
    """Sinks beside metrics.jsonl, which is always written."""

    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    project: str = "sodfast"


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
        if self.teacher.context == "demonstration" and samples < 2:
            raise ValueError(
                "rollout.samples_per_prompt must be at least 2 with teacher.context=demonstration "
                "(a demonstration is a sibling's rollout); raise it or set teacher.context=none"
            )
        if self.teacher.feedback and self.teacher.context == "none":
            raise ValueError("teacher.feedback=true needs teacher.context=demonstration")
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
        own = self.model.path is None and self.model.random is None
        if own and not isinstance(self.task, ArithmeticConfig | PythonConfig):
            raise ValueError(
                f"task.name={self.task.name} needs a model: set model.path (the lab's own model "
                "only knows task.name=arithmetic)"
            )
        if not (0 <= self.collapse.eval_floor <= 1 or isinstance(self.task, PythonConfig)):
            raise ValueError(
                f"collapse.eval_floor: {self.collapse.eval_floor} must lie in [0, 1], as the "
                f"rewards of task.name={self.task.name} do"
            )
        return self

    @property
    def length_shards(self) -> int | None:
        """See `CGTRConfig`; None for the other schedules."""
        return self.schedule.length_shards if isinstance(self.schedule, CGTRConfig) else None

    def to_layer(self) -> dict[str, Any]:
        """All values, as a layer that means the same wherever and whenever it is read."""
        layer: dict[str, Any] = _literal(self.model_dump(mode="json"))
        return layer

    @property
    def scoring_tokens(self) -> int:
        """Tokens of one scoring pass of the teacher at most, prompts included."""
        return self.teacher.micro_batch_tokens or self.optimizer.micro_batch_tokens

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_layer(), sort_keys=False, allow_unicode=True)


def load_config(source: str | None, overrides: list[str]) -> Config:
    """Read a preset's name or a YAML file (None: the preset `lab`), apply `key=value` overrides.

    Raises `UsageError` with one line for a missing, empty or malformed source, an override
    without `=`, an unknown key or a value that its key does not take.
    """
    layer = _read(source or "lab")
    for key, value in parse_overrides(overrides):
        _set(layer, key, value)
    return validate(layer)


def validate(layer: DictConfig | dict[str, Any]) -> Config:
    """Check a merged layer; raises `UsageError` naming each key that is wrong."""
    try:
        created = OmegaConf.create(layer)
        _refuse_environment(OmegaConf.to_container(created))
        values: Any = OmegaConf.to_container(created, resolve=True)
        for group, (key, default) in _DISCRIMINATORS.items():
            if isinstance(values.get(group), dict):
                values[group] = {key: default, **values[group]}
        # Validation goes through JSON, since pydantic's strict mode then takes a list for a tuple
        # and still refuses "5" for 5. No field may have a "before" validator: pydantic checks what
        # one returns as Python values, and strict mode refuses a list for a tuple there.
        return Config.model_validate_json(json.dumps(values), strict=True)
    except (OmegaConfBaseException, TypeError, RecursionError) as error:
        raise UsageError(f"configuration: {_first_line(error)}") from error
    except ValidationError as error:
        raise UsageError("; ".join(_explain(item) for item in error.errors())) from error


def read_overrides(path: Path, overrides: list[str]) -> DictConfig:
    """A run's stored configuration with overrides applied, not yet validated. A key that the
    release which stored it did not have says what that release did (`BEFORE`)."""
    layer = _read(str(path))
    for key, value in BEFORE.items():
        if OmegaConf.select(layer, key) is None:
            _set(layer, key, value)
    for key, value in parse_overrides(overrides):
        _set(layer, key, value)
    return layer


def override(config: Config, overrides: list[str]) -> Config:
    """`config` with `key=value` texts applied; raises `UsageError` as `load_config` does."""
    layer = OmegaConf.create(config.to_layer())
    for key, value in parse_overrides(overrides):
        _set(layer, key, value)
    return validate(layer)


def _read(source: str, above: tuple[Path, ...] = ()) -> DictConfig:
    """The values of a preset or file, merged over those of its base.

    `above`: the files, outermost first, whose `base` keys led to this one.
    """
    path = _preset(source)
    if not os.path.isfile(path):
        path = Path(source)
    if not os.path.isfile(path):
        names = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
        raise UsageError(f"no configuration file {source!r} and no such preset (presets: {names})")
    if path.resolve() in above:
        raise UsageError(f"{path} is built on itself: change its base or that of {above[-1]}")
    return _on_base(read_mapping(path), path, above)


def read_mapping(path: Path) -> DictConfig:
    """The mapping in a YAML file, its references unresolved. Raises `UsageError` for any other."""
    try:
        text = path.read_text(encoding="utf-8")
        _require_shallow(text)
        layer = OmegaConf.load(io.StringIO(text))
        _refuse_environment(OmegaConf.to_container(layer))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {_first_line(error)}") from error
    if not isinstance(layer, DictConfig) or not layer:
        raise UsageError(f"{path} must hold a mapping with at least one key")
    return layer


def _on_base(layer: DictConfig, path: Path, above: tuple[Path, ...]) -> DictConfig:
    """The layer, merged over the preset or file that its key `base` names.

    A file's name is relative to the folder of `path`, the layer's own file.
    """
    try:
        _rename(layer)
        base = layer.pop("base", None)
        if base is None:
            return layer
        if not isinstance(base, str):
            raise TypeError(f"base must be a preset's name or a file, not {_short(base)}")
        if not os.path.isfile(_preset(base)) and not base.endswith((".yaml", ".yml")):
            # Of any other file, an error would print the text.
            raise TypeError(f"base: {_short(base)} is neither a preset nor a file named *.yaml")
        if not os.path.isfile(_preset(base)):
            base = str(path.parent / base)
        below = _read(base, (*above, path.resolve()))
        for group, (key, default) in _DISCRIMINATORS.items():
            ours, theirs = layer.get(group), below.get(group)
            if isinstance(ours, DictConfig) and isinstance(theirs, DictConfig):
                kind = theirs.get(key, default)
                if ours.get(key, kind) != kind:
                    del below[group]
        merged = OmegaConf.merge(below, layer)
    except (OmegaConfBaseException, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: {_first_line(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _rename(layer: DictConfig) -> None:
    """Give the keys of earlier releases their names of today."""
    for old, new in RENAMED.items():
        group, _, name = old.partition(".")
        section = layer.get(group)
        if isinstance(section, DictConfig) and name in section:
            _say_once(f"{old} is now {new}; the next release will not know its old name")
            section[new.removeprefix(f"{group}.")] = section.pop(name)


@cache
def _say_once(message: str) -> None:
    _log.warning(message)


def _preset(name: str) -> Path:
    return PRESETS / f"{name}.yaml"


def parse_overrides(overrides: list[str]) -> list[tuple[str, Any]]:
    """Split `key=value` texts and read each value as YAML, in an order that is safe to apply.

    Raises `UsageError` for a text without a key or `=` and for a value that is not YAML.
    """
    pairs = []
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not _KEY.fullmatch(key):
            raise UsageError(
                f"{_short(text)} is not an override: write key=value, for example steps=10"
            )
        try:
            _require_shallow(text.partition("=")[2])
            layer = OmegaConf.from_dotlist([text])
            _refuse_environment(OmegaConf.to_container(layer))
            _rename(layer)
            key = RENAMED.get(key, key)
            value = OmegaConf.select(layer, key)
            if isinstance(value, str):
                value = _literal(value)  # `select` has resolved it
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
            raise UsageError(f"override {_short(text)}: {_first_line(error)}") from error
        pairs.append((key, value))
    # A change of kind empties its group, so it must come before the keys set within the group.
    kinds = {f"{group}.{key}" for group, (key, _) in _DISCRIMINATORS.items()}
    return sorted(pairs, key=lambda pair: pair[0] not in kinds)


def _set(layer: DictConfig, key: str, value: Any) -> None:
    group, _, name = key.partition(".")
    discriminator, default = _DISCRIMINATORS.get(group, (None, None))
    try:
        if discriminator and name == discriminator:
            current = layer.get(group) or {}
            if current.get(discriminator, default) != value:
                layer[group] = {}
        # A mapping as a value sets its whole group.
        OmegaConf.update(layer, key, value, merge=False)
    except (OmegaConfBaseException, AttributeError, TypeError) as error:
        raise UsageError(f"cannot set {key}: {_first_line(error)}") from error


def _explain(error: Any) -> str:
    """One pydantic error as `key: what is wrong`, without the union's tags in the path."""
    location = [str(part) for part in error["loc"]]
    if len(location) > 1 and location[0] in _DISCRIMINATORS:
        del location[1]
    key = ".".join(location)
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], error["loc"])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        return f"unknown key {key if len(key) <= 200 else _short(key)} ({hint})"
    if not key:
        return message
    return f"{key}: {message} (got {_short(error['input'])})"


def _known_keys(parents: list[str], location: tuple[Any, ...]) -> list[str]:
    section: Any = Config
    if parents and parents[0] in _DISCRIMINATORS:
        group, *parents = parents
        key, _ = _DISCRIMINATORS[group]
        members = _union_members(Config.model_fields[group].annotation)
        models = {member.model_fields[key].default: member for member in members}
        section = models[location[1]]
    for parent in parents:
        annotation = section.model_fields[parent].annotation
        section = next(iter(get_args(annotation)), annotation)  # the first of `section | None`
    return list(getattr(section, "model_fields", []))


def _union_members(annotation: Any) -> tuple[Any, ...]:
    while hasattr(annotation, "__metadata__"):
        annotation = annotation.__origin__
    return get_args(annotation)


def _require_shallow(text: str) -> None:
    """Raise `ValueError` where YAML is nested more deeply, or refers to more keys, than any
    configuration does."""
    if text.count("${") > _MOST_INTERPOLATIONS:
        raise ValueError(f"more than {_MOST_INTERPOLATIONS} interpolations")
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} levels deep")


def _refuse_environment(value: Any) -> None:
    """Raise `UsageError` for a value that reads the environment: it would end up in config.yaml,
    and a run is a function of its configuration alone."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for item in value:
            _refuse_environment(item)
    elif isinstance(value, str) and re.search(r"(?<!\\)(\\\\)*\$\{.*oc\.env", value):
        raise UsageError(f"{_short(value)} reads the environment: write the value itself")


def _literal(value: Any) -> Any:
    """`value` with `${` escaped, so that OmegaConf gives it back instead of looking up a key."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _first_line(error: BaseException) -> str:
    """What is wrong, and where in a YAML text, without a copy of that text."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem}, line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).split())[:300]
