"""The logits form, forward and backward, against the bandwidth of a copy.

    python bench/gpu_suite.py logits

8,192 rows of 151,936 logits in bf16, and in fp32, the type of the linear form's own tiles. What is
judged is the share of a copy's rate at which the design moves its bytes, and not one form's time
against another's: a top-k that is slower than a KL may still move more bytes in that time.
"""

from functools import partial
from typing import Any

import torch
from sodfast_kernels import distillation_loss
from suite_record import Case, Plan, Result
from suite_timing import Work, ceilings, take_turns

# What the design moves for an element of [N, V]: (logits of one side, d-logits), in widths of the
# logits' type. Two sweeps read both sides, JSD's too since every row here has an expansion; top-k
# reads both once, the student once more, and of both what its hot lanes hold. See the table in
# kernels/README.md, which says the same in bytes.
SWEEPS = {
    "KL": (4, 1),
    "JSD": (4, 1),
    "top-20 + tail": (3 + 2 * 20 / 1024, 1),
    "top-100 + tail": (3 + 2 * 100 / 1024, 1),
}


def bytes_per_element(name: str, dtype: torch.dtype) -> float:
    reads, writes = SWEEPS[name]
    return dtype.itemsize * (reads + writes)


def cases(plan: Plan) -> list[Case]:
    found = [Case("ceilings", 0.1, lambda: {"ceilings": ceilings(plan.device, plan.full)})]
    shape = (8192, 151_936) if plan.full else (16, 1203)
    for dtype in (torch.bfloat16, torch.float32):
        found.append(Case(str(dtype)[6:], 0.7, partial(measure, shape, dtype, plan)))
    return found


def measure(shape: tuple[int, int], dtype: torch.dtype, plan: Plan) -> Result:
    student = torch.randn(shape, device=plan.device).to(dtype)
    teacher = student + 0.02 * torch.randn_like(student)
    student.requires_grad_()
    target = torch.empty_like(teacher)
    token = torch.randint(shape[1], shape[:1], device=plan.device)

    def clear() -> None:
        student.grad = None

    def ours(**given: Any) -> Work:
        def step() -> None:
            distillation_loss(student, teacher, target_ids=token, **given).loss.backward()

        return Work(step, clear)

    works: dict[str, Work] = {
        "copy": Work(lambda: target.copy_(teacher)),
        "KL": ours(alpha=0.0),
        "JSD": ours(alpha=0.5),
        "top-20 + tail": ours(alpha=0.5, top_k=20),
        "top-100 + tail": ours(alpha=0.5, top_k=100),
    }
    return {"rows": shares(take_turns(works, plan.device), dtype, shape)}


def shares(
    found: dict[str, dict[str, Any]], dtype: torch.dtype, shape: tuple[int, int]
) -> list[dict[str, Any]]:
    """Rows with the bytes that the design moves and their rate as a share of the copy's."""
    copied = found.pop("copy")["milliseconds"] / (2 * dtype.itemsize)
    rows = []
    for name, row in found.items():
        moved = bytes_per_element(name, dtype)
        row |= {"name": name, "dtype": str(dtype)[6:], "rows": shape[0], "bytes": moved}
        if "milliseconds" in row:
            row["share_of_copy_bandwidth"] = moved * copied / row["milliseconds"]
        rows.append(row)
    return rows
