"""TRL's SDPO trainer with a schedule and the fused loss of sodfast: the three lines marked new.

    pip install ./kernels '.[trl]'
    python examples/trl_sdpo.py Qwen/Qwen3-0.6B runs/trl

The arguments are a model, as a directory or a hub id, and the folder that the run is written to.
"""

import re
import sys

from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from sodfast.integrations.trl import TeacherScheduleCallback, use_fused_loss  # new


def questions():
    pairs = [(left, right) for left in range(2, 20) for right in range(2, 20)]
    return [{"prompt": f"{a}*{b}+3=", "answer": str(a * b + 3)} for a, b in pairs]


def right(completions, answer, **others):
    """1 where the last number of an answer is the question's."""
    numbers = [re.findall(r"\d+", text) for text in completions]
    return [float(found[-1:] == [one]) for found, one in zip(numbers, answer, strict=True)]


def main(model, out, **settings):
    trainer = SDPOTrainer(
        model=model,
        args=SDPOConfig(
            output_dir=out,
            distillation_mode="full_logits",
            distillation_alpha=0.5,
            teacher_model_kind="ema",  # a teacher with weights of its own
            **settings,
        ),
        reward_funcs=right,
        train_dataset=questions(),
    )
    use_fused_loss(trainer)  # new
    trainer.add_callback(TeacherScheduleCallback({"kind": "cgtr"}))  # new
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:3])
