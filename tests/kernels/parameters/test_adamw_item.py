"""The scalars of a step: those of the formula, whatever the number of the step."""

import pytest
from sodfast_kernels.parameters.adamw_item import coefficients

GROUP = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def test_the_first_step_undoes_the_moments_rates():
    """After one step from zero m is (1 − β₁)g and v is (1 − β₂)g²: the update is lr·g / |g|."""
    scalars = coefficients(GROUP, 1)
    moved = scalars.step_size * scalars.mean_rate
    assert moved / (scalars.root_scale * scalars.square_rate**0.5) == pytest.approx(1e-2)
    assert scalars.square_decay + scalars.square_rate == pytest.approx(1.0)
    assert scalars.decay == pytest.approx(1.0 - 1e-3)
    assert scalars.eps == 1e-8


def test_bias_corrections_fade():
    first, later = coefficients(GROUP, 3), coefficients(GROUP, 10_000)
    assert first.step_size == pytest.approx(1e-2 / (1 - 0.9**3))
    assert first.root_scale == pytest.approx((1 - 0.99**3) ** -0.5)
    assert later.step_size == pytest.approx(1e-2) and later.root_scale == pytest.approx(1.0)
