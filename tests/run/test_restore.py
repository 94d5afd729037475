"""A checkpoint that does not fit the run is refused, and what does not fit is named.

That everything comes back bit for bit is tested in test_checkpoint.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save, tensors, update
from marks import slow
from torch import Tensor

from sodfast.config import CGTRConfig, FixedConfig, OptimizerConfig
from sodfast.errors import UsageError
from sodfast.model.language_model import LanguageModel
from sodfast.optimizer import build_optimizer
from sodfast.parallel.fsdp import Weights
from sodfast.run import checkpoint
from sodfast.run.restore import require_fitting, restore_student
from sodfast.schedule import build_schedule


@pytest.fixture
def optimizer(model: LanguageModel) -> torch.optim.Optimizer:
    optimizer = build_optimizer(OptimizerConfig(lr=1e-2), Weights(model.network))
    update(model, optimizer, 0)
    return optimizer


def change(tensors: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    first = min(tensors)
    rest = {name: tensor for name, tensor in tensors.items() if name != first}
    return {
        "empty": {},
        "missing": rest,
        "extra": {**tensors, "more.exp_avg": torch.zeros(2)},
        "misshapen": {**rest, first: torch.zeros(3, 5)},
    }[how]


@pytest.mark.parametrize("how", ["missing", "misshapen", *slow("empty", "extra")])
@pytest.mark.parametrize("part", ["teacher", "optimizer"])
@pytest.mark.parametrize("adamw", ["torch", *slow("fp32")])
def test_tensors_that_do_not_fit_are_named(
    model: LanguageModel, tmp_path: Path, adamw: Any, part: str, how: str
) -> None:
    """The hashes are right, as in a file that somebody has made."""
    optimizer = build_optimizer(OptimizerConfig(lr=1e-2, adamw=adamw), Weights(model.network))
    schedule = build_schedule(CGTRConfig())
    assert checkpoint.load(save(tmp_path, 0, model, optimizer)).optimizer == {}
    update(model, optimizer, 0)
    stored = checkpoint.load(save(tmp_path, 1, model, optimizer, teacher=tensors(model.network)))
    require_fitting(stored, model, optimizer, schedule)
    changed: Any = {part: change(getattr(stored, part), how)}
    stored = replace(stored, **changed)
    with pytest.raises(UsageError, match=rf"step-1 is damaged \(.*its {part}"):
        require_fitting(stored, model, optimizer, schedule)


def test_moments_before_the_first_step_and_another_schedule_do_not_fit(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    schedule = build_schedule(CGTRConfig())
    stored = checkpoint.load(save(tmp_path, 0, model, optimizer))
    with pytest.raises(UsageError, match="its optimizer has"):
        require_fitting(stored, model, optimizer, schedule)
    stored = checkpoint.load(save(tmp_path, 1, model, optimizer))
    with pytest.raises(UsageError, match="its schedule is not Fixed"):
        require_fitting(stored, model, optimizer, build_schedule(FixedConfig()))


def test_a_student_of_another_shape_is_refused(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    stored = checkpoint.load(save(tmp_path, 1, model, optimizer)).student
    for changed in ({**stored, "extra": torch.zeros(1)}, {}, change(stored, "misshapen")):
        with pytest.raises(UsageError, match="another model"):
            restore_student(model, changed)
