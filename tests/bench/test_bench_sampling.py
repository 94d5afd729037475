"""The sampling bench: what it compares, and per call."""

from typing import Any

import bench_sampling
import pytest
import torch
from bench_sampling import CALLS, LAB_VOCABULARY, calls, measure_rows, repeat, sort_top_p
from suite_record import Plan
from suite_state import likely_logits

CPU = torch.device("cpu")


def test_the_call_is_made_on_every_input() -> None:
    inputs = [torch.zeros(2, 3) + number for number in range(4)]
    seen: list[float] = []
    repeat(lambda z: seen.append(float(z[0, 0])), inputs)()
    assert seen == [0, 1, 2, 3]


def test_times_are_those_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def turns(works: dict[str, Any], device: torch.device) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {name: {"milliseconds": 50.0} for name in works}
        return found | {"sort, top-p": {"failed": "no"}}

    monkeypatch.setattr(bench_sampling, "take_turns", turns)
    result = measure_rows(4, torch.float32, Plan(CPU, full=False))
    rows = {row["name"]: row for row in result["rows"]}
    assert rows.keys() == calls(4, CPU).keys()
    assert rows["ours"]["milliseconds"] == 50.0 / CALLS["cpu"]
    assert rows["sort, top-p"]["failed"] == "no" and "milliseconds" not in rows["sort, top-p"]


def test_the_peer_of_top_p_draws_from_the_nucleus() -> None:
    torch.manual_seed(0)
    logits = likely_logits(64, LAB_VOCABULARY, torch.float32, CPU)
    sorted_p = (logits / 0.6).softmax(-1).sort(descending=True)
    before = sorted_p.values.cumsum(-1) - sorted_p.values
    kept = [
        set(ids[mass < 0.95].tolist()) for ids, mass in zip(sorted_p.indices, before, strict=True)
    ]
    for _ in range(5):
        drawn = sort_top_p(logits)[:, 0].tolist()
        assert all(token in nucleus for token, nucleus in zip(drawn, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_have_a_few_likely_tokens(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = likely_logits(8, 5000, dtype, CPU)
    assert logits.dtype == dtype
    top = logits.float().softmax(-1).topk(20).values.sum(-1)
    assert (top > 0.6).all()
