"""A task of your own: rows in a file, and a function that scores answers to them.

    python examples/own_task.py steps=40

Arguments are overrides of the configuration. The lab's model answers questions such as `17*8+6=`
and may correct itself after a `?`: here only what is right at the first attempt earns all of the
reward.
"""

import json
import sys
from pathlib import Path

import sodfast


def reward(prompts, completions, answer, **columns):
    """By TRL's convention: a batch of answers, and the rows' other columns as lists."""
    rewards = []
    for said, right in zip(completions, answer, strict=True):
        attempts = said.split("?")
        correct = attempts[-1].endswith(f"={right}")
        rewards.append(float(correct) if len(attempts) == 1 else 0.5 * correct)
    return rewards


def write_rows(file, products):
    rows = [(a, b, c) for a, b in products for c in range(1, 10)]
    lines = [{"prompt": f"{a}*{b}+{c}=", "answer": str(a * b + c)} for a, b, c in rows]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main(overrides):
    Path("rows").mkdir(exist_ok=True)
    products = [(a, b) for a in range(2, 20) for b in range(2, 10)]
    write_rows(Path("rows/train.jsonl"), products[::2])
    write_rows(Path("rows/test.jsonl"), products[1::16])
    task = [
        "task.name=python",
        f"task.source={__file__}:reward",
        "task.train=rows/train.jsonl",
        "task.test=rows/test.jsonl",
    ]
    run = sodfast.train("lab", [*task, "steps=40", *overrides])
    scores = [line["eval/mean@16"] for line in run.metrics if "eval/mean@16" in line]
    print(f"{run.path}: mean reward of the test questions {scores[0]:.3f} -> {scores[-1]:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
