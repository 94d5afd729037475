"""TRL's trainers on the tiny model: no network, a step in a tenth of a second.

Import it after `pytest.importorskip("trl", reason=ABSENT)`.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sodfast.lab.model import build_tokenizer

ABSENT = "TRL is absent: pip install 'sodfast[trl]'"
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 8,
    "distillation_mode": "full_logits",
    "distillation_alpha": 0.5,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}


def rising(completions: list[str], trainer_state: Any, **others: Any) -> list[float]:
    """Every second answer is right, and for nine steps each step's are a little better."""
    gained = 0.02 * min(trainer_state.global_step, 9)
    return [index % 2 + gained for index in range(len(completions))]


@contextmanager
def quiet() -> Iterator[None]:
    """TRL and transformers warn of what they deprecate in each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build_trainer(kind: str, model: Any, out: Path, **changed: Any) -> Any:
    """A trainer of `kind`, sdpo or sdft. model: a folder or a network."""
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    rows = [{"prompt": f"{left}*{left + 1}+3="} for left in range(16)]
    built = str(model) if isinstance(model, Path) else model
    given = {"output_dir": str(out), **SETTINGS, **changed}
    with quiet():
        if kind == "sdpo":
            return SDPOTrainer(
                model=built,
                args=SDPOConfig(**given),
                reward_funcs=rising,
                train_dataset=rows,
                processing_class=build_tokenizer(),
            )
        shown = [{**row, "privileged_context": "1+2=3"} for row in rows]
        return SDFTTrainer(
            model=built,
            args=SDFTConfig(**given),
            train_dataset=shown,
            processing_class=build_tokenizer(),
        )


def run(trainer: Any, **given: Any) -> Any:
    """`trainer.train`, without its words."""
    with quiet():
        trainer.train(**given)
    return trainer


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())
