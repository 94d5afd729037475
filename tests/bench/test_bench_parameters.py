"""The parameters' bench: what stands in memory together fits, and is gone before the next group."""

import gc
import weakref

import bench_parameters
import pytest
import torch
from bench_parameters import GROUPS, count, group, host, qwen3_8b, shapes_that_fit
from suite_record import Plan
from torch import nn

CPU = torch.device("cpu")
PLAN, FULL = Plan(CPU, full=False), Plan(CPU, full=True)


def test_shapes_are_those_of_qwen3_8b() -> None:
    assert count(qwen3_8b(36)) == 8_190_735_360
    assert len(qwen3_8b(36)) == 399


@pytest.mark.parametrize("name", GROUPS)
def test_what_takes_turns_fits_in_memory(name: str) -> None:
    _, bytes_per_parameter = GROUPS[name]
    limit = 78 * 2**30
    parameters = count(shapes_that_fit(FULL, bytes_per_parameter, limit))
    assert parameters * bytes_per_parameter < 0.85 * limit
    # As many as fit: another layer would not, or there is none.
    layer = count(qwen3_8b(2)) - count(qwen3_8b(1))
    assert parameters == 8_190_735_360 or (
        (parameters + layer) * bytes_per_parameter >= 0.85 * limit
    )
    with pytest.raises(ValueError, match="too few"):
        shapes_that_fit(FULL, bytes_per_parameter, 2**30)


def test_bytes_a_parameter_are_those_that_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, gradients and the states of the wide group; torchao is not there to be counted."""
    made: list[nn.Parameter] = []
    trainable = bench_parameters.trainable

    def watched(*given: object) -> list[nn.Parameter]:
        made.extend(trainable(*given))  # type: ignore[arg-type]
        return made

    monkeypatch.setattr(bench_parameters, "trainable", watched)
    updates = GROUPS["AdamW, wider moments"][0]([(512, 8)], CPU)
    for update in updates.values():
        update.run()
    held = sum(p.nbytes + p.grad.nbytes for p in made if p.grad is not None)
    for update in updates.values():
        (optimizer,) = (
            cell.cell_contents
            for cell in update.run.__closure__ or ()
            if isinstance(cell.cell_contents, torch.optim.Optimizer)
        )
        state = optimizer.state[made[0]]
        held += sum(value.nbytes for name, value in state.items() if name != "step")
    assert held == 22 * 512 * 8


def test_a_group_is_gone_when_it_has_been_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    make = bench_parameters.make

    def watched(*given: object) -> list[torch.Tensor]:
        made = make(*given)  # type: ignore[arg-type]
        alive.extend(weakref.ref(tensor) for tensor in made)
        return made

    monkeypatch.setattr(bench_parameters, "make", watched)
    monkeypatch.setattr(bench_parameters, "TINY_SHAPES", [(64, 8)])
    for name in GROUPS:
        rows = group(name, PLAN)["rows"]
        assert rows and all(row["share_of_copy_bandwidth"] > 0 for row in rows)
    gc.collect()
    assert alive and not any(reference() is not None for reference in alive)


def test_the_hosts_part_is_measured_for_everything_of_ours() -> None:
    names = {row["name"] for row in host(PLAN)["rows"]}
    assert names == {"copy", "average", "adamw 8bit", "adamw fp32", "adamw exact"}
