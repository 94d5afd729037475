"""The objective's bench: the floor is made of four products on random data, and rows are ratios."""

import bench_objective
import pytest
import torch
from bench_objective import eager_divergence, measure_rows, products
from sodfast_kernels import reference
from suite_gradients import Size
from suite_peers import Sides
from suite_record import Plan
from torch.utils.flop_counter import FlopCounterMode

SIZE = Size(24, 16, 203)
PLAN = Plan(torch.device("cpu"), full=False)


def sides() -> Sides:
    generator = torch.Generator().manual_seed(0)
    state, teacher = (torch.randn(24, 16, generator=generator) for _ in range(2))
    head = torch.randn(203, 16, generator=generator) / 4
    return Sides(state.requires_grad_(), head.requires_grad_(), teacher, head.detach())


@pytest.mark.parametrize(("name", "count"), [("four products", 4), ("three products", 3)])
def test_the_floor_is_its_number_of_products(name: str, count: int) -> None:
    floor = products(sides())[name]
    with FlopCounterMode(display=False) as counter:
        floor.run()
    assert counter.get_total_flops() == count * 2 * 24 * 16 * 203


def test_the_floor_multiplies_no_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros draw less power: a GPU multiplies them 12 % faster."""
    floor = products(sides())["four products"]
    seen: list[torch.Tensor] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore
            if getattr(function, "__name__", "") in ("matmul", "__matmul__"):
                seen.extend(args)
            return function(*args, **(kwargs or {}))

    with Watch():
        floor.run()
    assert len(seen) == 8
    assert all(float((operand == 0).float().mean()) < 0.01 for operand in seen)
    assert all(operand.std() > 0.1 for operand in seen)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_baseline_computes_the_same_divergence(alpha: float) -> None:
    given = sides()
    expected = reference.linear_distillation_loss(*given, alpha=alpha).loss
    torch.testing.assert_close(eager_divergence(given, alpha), expected)


def test_rows_are_times_the_floor() -> None:
    result = measure_rows(SIZE, 0.0, PLAN)
    rows = {row["name"]: row for row in result["rows"]}
    floor = rows["four products"]
    assert floor["times_the_floor"] == 1.0
    flops = 4 * 2 * 24 * 16 * 203
    share = flops / floor["milliseconds"] * 1e3 / result["flops_per_second"]
    assert floor["share_of_product_rate"] == pytest.approx(share)
    ours = rows["ours, top-20 + tail"]
    ratio = ours["milliseconds"] / floor["milliseconds"]
    assert ours["times_the_floor"] == pytest.approx(ratio)
    assert {"ours", "ours, top-100 + tail", "ours, frozen head", "eager"} <= rows.keys()


@pytest.mark.parametrize("name", ["ours", "eager"])
def test_clearing_removes_gradients(name: str) -> None:
    """They would count as memory that was there before, and be added to."""
    work = bench_objective.works(SIZE, 0.5, PLAN)[name]
    leaves = [cell.cell_contents for cell in work.clear.__closure__ or ()]
    assert len(leaves) == 2
    work.run()
    assert all(leaf.grad is not None for leaf in leaves)
    work.clear()
    assert all(leaf.grad is None for leaf in leaves)


def test_the_sizes_that_targets_are_about_come_first() -> None:
    names = [case.name for case in bench_objective.cases(Plan(torch.device("cpu"), full=True))]
    assert names[:3] == ["ceilings", "8192 rows, KL", "8192 rows, JSD"]
    assert len(names) == 9
