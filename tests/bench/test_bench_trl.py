"""The bench of TRL's loss: both paths get the same numbers, and less memory is taken by one."""

import pytest
import torch

pytest.importorskip("trl", reason="TRL is absent: pip install 'sodfast[trl]'")
from bench_trl import CPU, GPU, MODES, measure

pytestmark = pytest.mark.exhaustive


def test_rows_are_of_the_same_computation() -> None:
    small = CPU.model | {"vocab_size": 8000, "hidden_size": 32, "num_hidden_layers": 1}
    size = CPU._replace(model=small, answers=8, tokens=256)
    rows = measure(size, torch.device("cpu"), 1, lambda text: None)
    assert [(row["mode"], row["path"]) for row in rows] == [
        (mode, path) for mode in MODES for path in ("TRL's own", "fused")
    ]
    for theirs, ours in (rows[:2], rows[2:]):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)
        assert 0 < ours["peak_bytes"] < theirs["peak_bytes"]
        assert min(ours["seconds"], theirs["cpu_seconds"]) > 0


def test_the_shapes_are_those_of_the_page() -> None:
    assert CPU.model["vocab_size"] == 32_000
    assert (GPU.model["vocab_size"], GPU.dtype) == (151_936, torch.bfloat16)
