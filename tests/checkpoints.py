"""Checkpoints of a tiny model, written without a run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sodfast.model.language_model import LanguageModel
from sodfast.run import checkpoint
from sodfast.run.restore import optimizer_tensors

STATE: dict[str, Any] = {
    "fingerprint": "f",
    "schedule": {
        "window": [{"step": 1, "reward_mean": 0.1, "length_mean": 7.5, "length_max": 9}],
        "last_copy": 0,
        "reward_reference": None,
    },
    "collapse": {"long_steps": 0, "best_eval": 0.1, "step": None},
    "reward_memory": {"a": 0.5},
}


def update(model: LanguageModel, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.network.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def save(
    directory: Path,
    step: int,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    **options: Any,
) -> Path:
    teacher = options.pop("teacher", None)
    state = {**STATE, "teacher_is_student": teacher is None}
    student = model.network.state_dict()
    moments = optimizer_tensors(model.network, optimizer)
    return checkpoint.save(
        directory, step, model, student, teacher, moments, state, **{"keep": 9, **options}
    )


def tensors(network: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)
