"""Bounds: what no key takes, so that nothing fails in the middle of a run."""

import pytest
from configurations import lab, refusal


def floats() -> list[str]:
    """Every key that takes a float, from the configuration itself."""
    keys = []
    for name, section in lab().model_dump().items():
        if isinstance(section, dict) and name != "lab":
            keys += [f"{name}.{key}" for key, value in section.items() if isinstance(value, float)]
    return keys


@pytest.mark.parametrize("key", floats())
@pytest.mark.parametrize("bad", [".nan", ".inf", "-.inf"])
def test_no_number_may_be_nan_or_infinite(key: str, bad: str) -> None:
    assert refusal(f"{key}={bad}").startswith(f"{key}: ")


def test_numbers_within_lists_may_not_be_nan_either() -> None:
    assert refusal("optimizer.betas=[0.9, .nan]").startswith("optimizer.betas.1: ")
    assert refusal("objective.clip_range=[.inf, 0.2]").startswith("objective.clip_range.0: ")
    assert refusal("steps=.nan").startswith("steps: ")


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.betas=[1,1]",
        "optimizer.eps=1e-300",
        "optimizer.lr=1e300",
        "rollout.temperature=1e-300",
        "rollout.temperature=1e300",
        "eval.temperature=1e-300",
        "schedule.window=1e20",
        "schedule.window=100000000000000000000",
        "schedule.window=9223372036854775807",
        "objective.ratio_cap=1e308",
        "rollout.cache_gib=1e300",
        "memory_gib=1e300",
        "threads=2147483648",
        "device=cuda:99999999999999999999",
        "device=cuda:1000",
        "lab.passes=[]",
        "lab.passes=[-1,2]",
        "lab.passes=[0.5]",
        "lab.passes=[1,0]",
        "lab.long_passes=9",
        "lab.heads=1000",
        "lab.heads=0",
        "lab.heads=5",
        "lab.hidden_size=100000000000000000000",
        "lab.product_error=[2,3]",
        "lab.sum_error=[-1,0]",
        "lab.lr=1e300",
        "model.path=" + "x" * 300,
        "model.path=" + "x/" * 2500,
        'out="a\\0b"',
    ],
    ids=lambda text: text[:40],
)
def test_values_that_would_fail_in_the_middle_of_a_run(override: str) -> None:
    message = refusal(override)
    assert override.partition("=")[0] in message and len(message) < 800
