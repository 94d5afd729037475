"""Every check of gradients can fail: a wrong number, a wrong row, a NaN, a missing factor."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import suite_gradients
import torch
from sodfast_kernels import reference
from suite_gradients import Found, Size, compare, defined, differing, gradients, make_inputs
from suite_record import check, worst

CPU, SIZE = torch.device("cpu"), Size(21, 8, 67)
Change = Callable[[Found], None]


def founds(dtype: torch.dtype) -> tuple[Found, Found, Found]:
    """Gradients of the definition as a user would get them, in fp64, and in fp32."""
    inputs = make_inputs(SIZE, dtype, CPU)
    ours = gradients(reference.linear_distillation_loss, inputs, alpha=0.5)
    exact, plain = (
        defined(inputs, compute, 4, alpha=0.5) for compute in (torch.float64, torch.float32)
    )
    return ours, exact, plain


def missed(change: Change | None, dtype: torch.dtype, ties: bool = False) -> set[str]:
    ours, exact, plain = founds(dtype)
    if change is not None:
        change(ours)
    return {row["check"] for row in compare(ours, exact, plain, dtype, ties) if not row["met"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_definition_meets_every_check(dtype: torch.dtype) -> None:
    assert missed(None, dtype) == set()


def nan_in_head(found: Found) -> None:
    found.d_head[3, 2] = math.nan


def nan_in_state(found: Found) -> None:
    found.d_state[-1, 0] = math.nan


def infinite(found: Found) -> None:
    found.d_state[0, 0] = math.inf


def one_row_is_another(found: Found) -> None:
    found.d_state[5] = found.d_state[6]


def one_row_is_zero(found: Found) -> None:
    found.d_head[7] = 0


def one_percent_too_much(found: Found) -> None:
    found.d_head.mul_(1.02)


def a_divergence_of_nan(found: Found) -> None:
    found.statistics["divergence"][2] = math.nan


def a_negative_divergence(found: Found) -> None:
    found.statistics["divergence"][2] = -1e-9


def an_entropy_in_bits(found: Found) -> None:
    found.statistics["student_entropy"].div_(math.log(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (nan_in_head, {"d_head: error", "d_head: share of wrong rows"}),
        (nan_in_state, {"d_state: error", "d_state: share of wrong rows"}),
        (infinite, {"d_state: error", "d_state: share of wrong rows"}),
        (one_row_is_another, {"d_state: share of wrong rows"}),
        (one_row_is_zero, {"d_head: share of wrong rows"}),
        (one_percent_too_much, {"d_head: error"}),
        (a_divergence_of_nan, {"divergence: error", "least divergence"}),
        (a_negative_divergence, {"least divergence"}),
        (an_entropy_in_bits, {"student_entropy: error"}),
    ],
)
def test_what_is_wrong_is_found(change: Change, expected: set[str], dtype: torch.dtype) -> None:
    assert expected <= missed(change, dtype)


def test_one_wrong_row_among_thousands_is_found_although_the_whole_error_is_small() -> None:
    exact = torch.randn(16_384, 8, dtype=torch.float64)
    found = exact.clone()
    found[9] = -found[9]
    other = {"divergence": torch.ones(1)}
    whole = Found(exact, exact, other)
    rows = {
        row["check"]: row
        for row in compare(Found(found, exact, other), whole, whole, torch.bfloat16, ties=True)
    }
    # With ties a few rows may differ: that is what a share of 3e-3 is for.
    assert rows["d_state: share of wrong rows"]["value"] == pytest.approx(1 / 16_384)
    (missed,) = [
        row["check"]
        for row in compare(Found(found, exact, other), whole, whole, torch.bfloat16, ties=False)
        if not row["met"] and "wrong rows" in row["check"]
    ]
    assert missed == "d_state: share of wrong rows"


def test_slices_of_the_definition_add_up() -> None:
    inputs = make_inputs(SIZE, torch.float32, CPU)
    whole, cut = (defined(inputs, torch.float64, rows, alpha=0.0) for rows in (100, 4))
    torch.testing.assert_close(cut.d_state, whole.d_state)
    torch.testing.assert_close(cut.d_head, whole.d_head)
    for name, value in whole.statistics.items():
        torch.testing.assert_close(cut.statistics[name], value)


def test_inputs_have_peaked_rows_and_rows_without_weight() -> None:
    inputs = make_inputs(Size(200, 32, 50), torch.float32, CPU)
    logits = inputs.state @ inputs.head.T
    assert logits[1::2].std() > 4 * logits[::2].std()
    weight = inputs.terms["distill_weight"]
    assert 5 < (weight == 0).sum() < 40 and ((weight == 0) | (weight >= 0.6)).all()


def test_differing_bits_are_counted_by_tensor() -> None:
    ours, exact, _ = founds(torch.float32)
    assert differing(ours, ours) == 0
    assert differing(ours, exact) == 1
    changed = ours._replace(d_head=ours.d_head + 1)
    assert differing(ours, changed) == pytest.approx(1 / 6)
    nan = ours._replace(d_head=torch.full_like(ours.d_head, math.nan))
    assert differing(nan, nan) == pytest.approx(1 / 6)


@pytest.mark.parametrize("value", [math.nan, 1.1, math.inf])
def test_nothing_but_a_number_within_its_limit_is_met(value: float) -> None:
    assert not check("error", value, 1.0)["met"]
    assert not check("share", -value, 0.0, at_most=False)["met"]


def test_the_worst_of_values_with_a_nan_is_nan() -> None:
    assert math.isnan(worst([0.0, math.nan, 1.0])) and math.isnan(worst([math.nan, 1.0]))
    assert worst([0.5, 2.0]) == 2.0


def test_the_error_is_relative() -> None:
    exact = torch.tensor([3.0, 4.0])
    found: Any = suite_gradients.relative_error(exact + torch.tensor([0.0, 0.5]), exact)
    assert found == pytest.approx(0.1)
