"""The logits bench judges by the bytes that the design moves."""

import pytest
import torch
from bench_logits import bytes_per_element, measure, shares
from suite_record import Plan


def test_bytes_are_those_of_the_kernels_page() -> None:
    """kernels/README.md: 10, 10 and 8.1 bytes an element of bf16 logits."""
    found = [bytes_per_element(name, torch.bfloat16) for name in ("KL", "JSD", "top-20 + tail")]
    assert found == pytest.approx([10, 10, 8.1], abs=0.03)
    assert bytes_per_element("KL", torch.float32) == 20


def test_a_share_is_bytes_over_those_of_a_copy_in_the_same_time() -> None:
    found = {"copy": {"milliseconds": 2.0}, "KL": {"milliseconds": 10.0}, "JSD": {"failed": "no"}}
    rows = {row["name"]: row for row in shares(found, torch.bfloat16, (4, 8))}
    # A copy moves 4 bytes an element in 2 ms, ours 10 in 10 ms.
    assert rows["KL"]["share_of_copy_bandwidth"] == pytest.approx(0.5)
    assert rows["JSD"]["failed"] == "no" and "share_of_copy_bandwidth" not in rows["JSD"]


def test_every_form_has_a_share() -> None:
    rows = measure((5, 67), torch.float32, Plan(torch.device("cpu"), full=False))["rows"]
    assert [row["name"] for row in rows] == ["KL", "JSD", "top-20 + tail", "top-100 + tail"]
    assert all(row["share_of_copy_bandwidth"] > 0 for row in rows)
