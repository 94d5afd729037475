"""Distillation with Liger's loss, and the three lines that make it ours.

    python examples/liger_loss.py

Before, with `pip install liger-kernel`:

    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    loss_fn = LigerFusedLinearJSDLoss(beta=0.5, weight_hard_loss=0.5, weight_soft_loss=0.5)
    loss = loss_fn(hidden, head, teacher_hidden, teacher_head, labels)

The values and gradients are the same, with Liger's labels: shifted already, -100 for no loss.
"""

import torch
from sodfast_kernels.modules import FusedLinearDistillationLoss  # line 1
from transformers import Qwen3Config, Qwen3Model

SIZES = {"vocab_size": 500, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
loss_fn = FusedLinearDistillationLoss(alpha=0.5, hard_weight=0.5, soft_weight=0.5)  # line 2


def network(width):
    """Hidden states [N, width] of tokens, and a head [V, width]."""
    heads = {"num_attention_heads": width // 16, "num_key_value_heads": width // 16}
    model = Qwen3Model(Qwen3Config(hidden_size=width, **heads, **SIZES))
    return model, torch.nn.Linear(width, SIZES["vocab_size"], bias=False)


def main(steps=20):
    torch.manual_seed(0)
    (student, head), (teacher, teacher_head) = network(32), network(64)
    optimizer = torch.optim.AdamW([*student.parameters(), *head.parameters()], lr=3e-3)
    tokens = torch.randint(0, 500, (4, 16))
    labels = torch.cat([tokens[:, 1:], torch.full((4, 1), -100)], 1).flatten()
    losses = []
    for _ in range(steps):
        hidden = student(tokens).last_hidden_state.flatten(0, 1)
        with torch.no_grad():
            teacher_hidden = teacher(tokens).last_hidden_state.flatten(0, 1)
        loss = loss_fn(hidden, head.weight, teacher_hidden, teacher_head.weight, labels)  # line 3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
