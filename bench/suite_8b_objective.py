"""Part `8b_objective`: the fused objective in bf16 beside its definition in fp32 on the same hidden
states, at the shape of Qwen3-0.6B: relative errors of loss and entropy, cosines of gradients."""

from functools import partial
from pathlib import Path

import torch
from sodfast_kernels import linear_distillation_loss, reference
from suite_record import Case, Plan, Result, check

SOURCES = [*(Path(__file__).parents[1] / "sodfast").rglob("*.py")]
COSINE = 0.999


def agreement(plan: Plan, rows: int) -> Result:
    from sodfast.model.packing import response_hidden
    from sodfast.model.random_weights import random_model

    device, dtype = plan.device, torch.bfloat16
    name = "Qwen/Qwen3-0.6B" if plan.full else "sodfast/tiny"
    model = random_model(name, device, dtype, seed=0)
    generator = torch.Generator().manual_seed(3)
    ids = list(torch.randint(2, len(model.head), (8, 32 + rows // 8), generator=generator))
    with torch.no_grad():
        hidden_NH = response_hidden(model.network, [x[:32] for x in ids], [x[32:] for x in ids])
        teacher_NH = hidden_NH + 0.1 * torch.randn_like(hidden_NH)
        teacher_VH = model.head + 0.002 * torch.randn_like(model.head)
    targets = torch.cat([x[32:] for x in ids]).to(device)
    found = []
    for function, precision in (
        (linear_distillation_loss, dtype),
        (reference.linear_distillation_loss, torch.float32),
    ):
        student, head = (x.detach().to(precision).requires_grad_() for x in (hidden_NH, model.head))
        output = function(
            student,
            head,
            teacher_NH.to(precision),
            teacher_VH.to(precision),
            target_ids=targets,
            advantage=torch.linspace(-1, 1, len(targets), device=device),
        )
        output.loss.backward()
        gradients = [x.grad.float().flatten().cpu() for x in (student, head) if x.grad is not None]
        loss, entropy = output.loss.item(), output.student_entropy.float().mean().item()
        found.append((loss, entropy, *gradients))
    ours, exact = found
    cosine = torch.nn.functional.cosine_similarity
    cosines = {
        "hidden_cosine": cosine(ours[2], exact[2], dim=0).item(),
        "head_cosine": cosine(ours[3], exact[3], dim=0).item(),
    }
    return {
        "checks": [check(key, value, COSINE, at_most=False) for key, value in cosines.items()],
        "rows": [],
        "positions": len(targets),
        "loss_error": abs(ours[0] / exact[0] - 1),
        "entropy_error": abs(ours[1] / exact[1] - 1),
        **cosines,
    }


def cases(plan: Plan) -> list[Case]:
    rows = 2048 if plan.full else 64
    return [Case("beside the definition", 1.0, partial(agreement, plan, rows))]
