"""The whole configuration, typed: a preset or file, then dotted overrides, then validation.

Layers are read and merged by layers.py and checked by pydantic: each group of keys by its model in
a file of this folder, and here what goes together. So an unknown key, a wrong type and an
impossible combination are all found before any work. `__all__` is what other modules import.

Defaults follow Table 9 and Appendix A of the CGTR paper (arXiv 2606.03532) where it gives them.
"""

import json
import os
from collections.abc import Sequence
from typing import Annotated, Any

import yaml
from omegaconf import DictConfig, OmegaConf
from pydantic import Field, ValidationError, model_validator

from sodfast.config.layers import (
    BEFORE,
    PRESETS,
    RENAMED,
    apply,
    explain,
    first_line,
    literal,
    parse_overrides,
    read_layer,
    read_mapping,
    read_overrides,
    resolve,
)
from sodfast.config.model import LabConfig, LoRAConfig, ModelConfig
from sodfast.config.records import CheckpointConfig, CollapseConfig, LogConfig
from sodfast.config.schedules import (
    CGTRConfig,
    EMAConfig,
    EvidenceConfig,
    FixedConfig,
    HardConfig,
    PythonScheduleConfig,
    ScheduleConfig,
    TrustRegionConfig,
    gate_names,
)
from sodfast.config.tasks import (
    ArithmeticConfig,
    ArrivalConfig,
    CodeConfig,
    EvalConfig,
    MathConfig,
    MultipleChoiceConfig,
    PythonConfig,
    RowsConfig,
    SandboxConfig,
    Scorer,
    SplitConfig,
    Subject,
    TaskConfig,
    ToolUseConfig,
)
from sodfast.config.training import (
    BurstConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    TeacherConfig,
)
from sodfast.config.types import Gibibytes, NewPath, Positive, Section
from sodfast.errors import UsageError

__all__ = [
    "BEFORE",
    "PRESETS",
    "RENAMED",
    "ArithmeticConfig",
    "ArrivalConfig",
    "BurstConfig",
    "CGTRConfig",
    "CheckpointConfig",
    "CodeConfig",
    "CollapseConfig",
    "Config",
    "EMAConfig",
    "EvalConfig",
    "EvidenceConfig",
    "FixedConfig",
    "HardConfig",
    "LabConfig",
    "LoRAConfig",
    "LogConfig",
    "MathConfig",
    "ModelConfig",
    "MultipleChoiceConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PythonConfig",
    "PythonScheduleConfig",
    "RolloutConfig",
    "RowsConfig",
    "SandboxConfig",
    "ScheduleConfig",
    "Scorer",
    "Section",
    "SplitConfig",
    "Subject",
    "TaskConfig",
    "TeacherConfig",
    "ToolUseConfig",
    "TrustRegionConfig",
    "gate_names",
    "load_config",
    "override",
    "parse_overrides",
    "read_mapping",
    "read_overrides",
    "validate",
]

# Pairs of model.dtype and optimizer.adamw that make no sense, and why.
_REFUSED_ADAMW = {
    ("float32", "exact"): "float32 weights are their own exact master; use fp32",
    ("float32", "plain"): "plain is torch's AdamW on bfloat16 weights; use torch",
    ("bfloat16", "torch"): (
        "rounded to nearest, bfloat16 weights lose most of a small update; use 8bit, fp32 or "
        "exact, or plain where that loss is the point"
    ),
}


class Config(Section):
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """What every random number of the run is drawn from, but those of the lab's start model."""
    out: NewPath | None = None
    """The run directory itself; null: a new folder under runs/."""
    steps: Positive = 150
    """Training steps of the whole run."""
    threads: Positive | None = None
    """CPU threads of the run; null: torch's choice."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,2})?)$")] = "auto"
    """Where the run computes: `cpu`, `cuda`, `cuda:N`, or auto, a GPU where there is one."""
    memory_gib: Gibibytes | None = None
    """What a GPU's allocator may hand out, in GiB; null: all of it, for which `sodfast plan`
    assumes 78."""
    model: ModelConfig = ModelConfig()
    """The model that is trained."""
    lab: LabConfig = LabConfig()
    """The lab's own model, which is built where `model` names none, and its warm start."""
    task: TaskConfig = ArithmeticConfig()
    """What is asked, and how answers are scored."""
    rollout: RolloutConfig = RolloutConfig()
    """How the student answers the questions of a step."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The loss."""
    teacher: TeacherConfig = TeacherConfig()
    """What the teacher is shown, and where it lies."""
    schedule: ScheduleConfig = CGTRConfig()
    """When the teacher moves."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How the student's weights follow the gradient."""
    eval: EvalConfig = EvalConfig()
    """The examinations during a run, and the sampling of `sodfast eval`."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What a run can be resumed from."""
    collapse: CollapseConfig = CollapseConfig()
    """When a run counts as collapsed, where the paper gives no thresholds and these are ours."""
    log: LogConfig = LogConfig()
    """What is written beside metrics.jsonl, which always is."""

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
