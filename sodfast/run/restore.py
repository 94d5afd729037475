"""A checkpoint's tensors and the parts of a run: whether they fit, and into which they go."""

import copy
from collections.abc import Mapping

import sodfast_kernels
import torch
from sodfast_kernels.parameters import empty_state
from torch import Tensor, nn

from sodfast.errors import UsageError
from sodfast.model.language_model import LanguageModel, trained_parameters
from sodfast.model.lora import peft_name
from sodfast.run.checkpoint import Checkpoint, damaged
from sodfast.schedule import Schedule


def require_fitting(
    stored: Checkpoint, model: LanguageModel, optimizer: torch.optim.Optimizer, schedule: Schedule
) -> None:
    """Raise `UsageError` unless a checkpoint's teacher, moments and schedule are those of such a
    run: no tensor missing, none extra, and each of its shape. (`restore_student` looks at the
    student's.) Before the first step there are no moments, and after it all."""
    try:
        copy.deepcopy(schedule).load_state_dict(stored.state["schedule"])
    except (KeyError, ValueError) as error:
        reason = ValueError(f"its schedule is not {type(schedule).__name__}")
        raise damaged(stored.path, reason) from error
    trained = trained_parameters(model.network)
    try:
        if stored.teacher is not None:
            _require_like("teacher", stored.teacher, {n: p.shape for n, p in trained.items()})
        moments = {
            f"{name}.{moment}": empty.shape
            for name, parameter in (trained.items() if stored.step else ())
            for moment, empty in _moments(optimizer, parameter).items()
        }
        _require_like("optimizer", stored.optimizer, moments)
    except ValueError as error:
        raise damaged(stored.path, error) from error


def _moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The optimizer's state of a whole parameter after a step, without values."""
    like = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    if isinstance(optimizer, sodfast_kernels.AdamW):
        return empty_state(like, optimizer.param_groups[0]["state"])
    return {"step": torch.empty((), device="meta"), "exp_avg": like, "exp_avg_sq": like}


def _require_like(
    part: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> None:
    """Raise `ValueError` that names the first tensor that is missing, extra or misshapen."""
    for name in sorted(tensors.keys() | shapes.keys()):
        if name not in tensors:
            raise ValueError(f"its {part} has no {name}")
        if name not in shapes:
            raise ValueError(f"its {part} has {name}, which the model has not")
        if tensors[name].shape != shapes[name]:
            found, wanted = tuple(tensors[name].shape), tuple(shapes[name])
            raise ValueError(f"{name} of its {part} has the shape {found}, not {wanted}")


def restore_student(
    model: LanguageModel, tensors: dict[str, Tensor], base: str | None = None
) -> None:
    """Copy stored weights in; what is frozen or tied to another may be absent, nothing else.

    `base`: the `model.base` that adapters were stored with. Raises `UsageError` where the model's
    is another one.
    """
    if base != model.base:
        raise UsageError(
            "the checkpoint's adapters belong to other base weights than the present ones: let "
            "model.path and model.dtype give what the run began with"
        )
    trained = trained_parameters(model.network)
    own = {peft_name(name): name for name in trained}
    named = {own.get(name, name): tensor for name, tensor in tensors.items()}
    shapes = {name: tensor.shape for name, tensor in model.network.state_dict().items()}
    extra = named.keys() - shapes.keys()
    tied = set(getattr(model.network, "all_tied_weights_keys", {}) or {})
    frozen = {name for name, _ in model.network.named_parameters()} - trained.keys()
    missing = shapes.keys() - named.keys() - tied - frozen
    misshapen = {n for n in named.keys() & shapes.keys() if named[n].shape != shapes[n]}
    if extra or missing or misshapen:
        raise UsageError(
            f"the checkpoint's student is another model: missing {sorted(missing)}, "
            f"extra {sorted(extra)}, of another shape {sorted(misshapen)}"
        )
    model.network.load_state_dict(named, strict=False)


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by NAME.MOMENT."""
    names = list(trained_parameters(network))
    return {
        f"{names[index]}.{key}": value.contiguous()
        for index, moments in optimizer.state_dict()["state"].items()
        for key, value in moments.items()
    }


def restore_optimizer(
    network: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    indices = {name: index for index, name in enumerate(trained_parameters(network))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition(".")
        state.setdefault(indices[name], {})[moment] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
