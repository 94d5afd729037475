"""The pages about other people's trainers run from top to bottom, and so do their examples."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ABSENT = "TRL is absent: pip install 'sodfast[trl]'"


def run_page(name: str) -> dict[str, Any]:
    """The namespace that its blocks of Python leave."""
    text = (ROOT / "docs" / name).read_text()
    namespace: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(block, name, "exec"), namespace)
    for block in re.findall(r"^```python \S+\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        compile(block, name, "exec")  # of another project's file
    return namespace


def test_the_schedule_in_a_loop_of_ones_own() -> None:
    """Against a fake worker group: published when moved, and at no other time."""
    left = run_page("schedule_in_your_loop.md")
    published: list[int] = []
    workers = left["Workers"]()
    teacher = left["TeacherSchedule"](
        {"kind": "ema", "rate": 0.5}, workers, publish=lambda: published.append(1)
    )
    start = float(workers.ref_module.weight.detach())
    left["train"](teacher, workers, range(1, 4), [])
    assert len(published) == 3
    assert float(workers.ref_module.weight.detach()) == pytest.approx(
        start / 8 + 1 / 8 + 2 / 4 + 3 / 2
    )


def test_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason=ABSENT)
    monkeypatch.chdir(tmp_path)
    left = run_page("trl.md")
    assert left["copied"] == [2, 4, 6]


def test_the_example_of_trl(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason=ABSENT)
    main = runpy.run_path(str(ROOT / "examples" / "trl_sdpo.py"))["main"]
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "max_completion_length": 12,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
    }
    trainer = main(str(tiny_model), str(tmp_path), **settings)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == trainer.state.global_step == 3


def test_the_example_of_liger() -> None:
    left = runpy.run_path(str(ROOT / "examples" / "liger_loss.py"))
    losses = left["main"](20)
    assert losses[-1] < 0.8 * losses[0]
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is absent")
    torch.manual_seed(0)
    given = [torch.randn(6, 8), torch.randn(9, 8), torch.randn(6, 4), torch.randn(9, 4)]
    labels = torch.tensor([1, 2, -100, 3, 8, 0])
    theirs = chunked.LigerFusedLinearJSDLoss(
        beta=0.5, weight_hard_loss=0.5, weight_soft_loss=0.5, compiled=False
    )
    torch.testing.assert_close(left["loss_fn"](*given, labels), theirs(*given, labels))
