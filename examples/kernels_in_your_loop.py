"""The kernels in a loop of your own: a small student learns from a large teacher and from labels.

    python examples/kernels_in_your_loop.py 200

The argument is the number of steps. Nothing of sodfast's trainer is used: torch and
`sodfast_kernels` alone.
"""

import sys

import torch
from sodfast_kernels import AdamW
from sodfast_kernels.modules import FusedLinearDistillationLoss
from torch import nn


class Decoder(nn.Module):
    """Stands for a language model: hidden states [B, T, H] of tokens [B, T], and a head [V, H]."""

    def __init__(self, width, vocabulary):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        return self.body(self.embed(tokens))[0]


def batch():
    """Counting in steps: the first two tokens, without loss, say how it goes on."""
    start, step = torch.randint(0, 32, (2, 16, 1))
    tokens = (start + step * torch.arange(8)) % 32
    return tokens, tokens.masked_fill(torch.arange(8) < 2, -100)


def train_teacher(teacher, steps):
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    for _ in range(steps):
        tokens, labels = batch()
        logits = teacher.head(teacher(tokens))[:, :-1]
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        optimizer.step()


def train_student(student, teacher, steps):
    # What a trainer would compute from the logits of both models, from their hidden states instead.
    loss_fn = FusedLinearDistillationLoss(
        alpha=0.5, hard_weight=0.5, soft_weight=1.0, shift=True, return_parts=True
    )
    optimizer = AdamW(student.parameters(), lr=1e-2, state="8bit")
    for step in range(1, steps + 1):
        tokens, labels = batch()
        with torch.no_grad():
            taught = teacher(tokens)
        loss, hard, soft, output = loss_fn(
            student(tokens),
            student.head.weight,
            taught,
            teacher.head.weight,
            labels,
            student_bias=student.head.bias,
            teacher_bias=teacher.head.bias,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 40 == 0 or step == steps:
            entropy = output.student_entropy.sum() / (labels[:, 1:] != -100).sum()
            print(
                f"step {step:4d}  labels {hard.item():.3f}  divergence {soft.item():.3f}  "
                f"entropy {entropy.item():.3f}"
            )


def main(steps):
    torch.manual_seed(0)
    # Heads may be padded differently: the smaller one's rows are the vocabulary.
    student, teacher = Decoder(32, 32), Decoder(64, 40)
    train_teacher(teacher, steps)
    train_student(student, teacher, steps)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 200)
