"""Part `8b_trl`: two steps of TRL's SDPO trainer at the largest Qwen3 that fits, a size a case.

8B is not among the sizes: TRL keeps weights, teacher, gradients and AdamW's two moments in bf16 on
the device, ten bytes a parameter, so 82 GB.
Its answers run to the cap, one token of the whole batch at a time, so the cap is lower than the
preset's. It loads its teacher from where the model came from, so the weights are written to disk.
"""

import tempfile
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from suite_record import Case, Plan, Result, Skipped
from suite_timing import clock

SOURCES = [
    Path(__file__).with_name("forced_run.py"),
    *(Path(__file__).parents[1] / "sodfast").rglob("*.py"),
]
SIZES = {"4B": 4.5, "1.7B": 2.0, "0.6B": 1.5}  # the largest first; minutes
TOKENS = 2048


def two_steps(name: str, device: torch.device, prompts: int, tokens: int) -> dict[str, Any]:
    """Seconds of the second step of a shipped shape, and the peak in bytes of both."""
    from forced_run import HalfRight, word_tokenizer
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    from sodfast.model.packing import own_attention
    from sodfast.model.random_weights import random_model

    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(name, device, torch.bfloat16, seed=0)
        vocabulary = len(model.head)
        task = HalfRight(vocabulary, prompts * 2, 250)
        with own_attention(model.network):
            model.network.save_pretrained(f"{folder}/model")
        del model
        arguments = SDPOConfig(
            output_dir=f"{folder}/run",
            model_init_kwargs={"dtype": torch.bfloat16},
            max_steps=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=prompts * 4,
            num_generations=4,
            max_completion_length=tokens,
            distillation_mode="topk_logits",
            distillation_topk=20,
            distillation_add_tail=True,
            distillation_alpha=0.5,
            activation_checkpointing=True,
            bf16=device.type == "cuda",
            use_cpu=device.type == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )

        def reward(completions: list[str], **others: Any) -> list[float]:
            times.append(clock(device))  # once a step, after its answers
            return [float(index % 2) for index in range(len(completions))]

        trainer = SDPOTrainer(
            model=f"{folder}/model",
            args=arguments,
            reward_funcs=reward,
            train_dataset=[{"prompt": question.prompt} for question in task.train],
            processing_class=word_tokenizer(vocabulary),
        )
        trainer.train()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {
        "name": f"TRL: SDPO, {name}",
        "milliseconds": 1e3 * (times[-1] - times[-2]),
        "responses": prompts * 4,
        "tokens_each": tokens,
        "peak_bytes": peak,
        "trl": version("trl"),
    }


class Sizes:
    """Runs a size unless a larger one has ended its steps in this process."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.largest: str | None = None

    def run(self, size: str) -> Result:
        if not self.plan.full or find_spec("trl") is None or "trl" in self.plan.without:
            raise Skipped("needs trl and full sizes")
        if self.largest is not None:
            raise Skipped(f"{self.largest} fits")
        torch.cuda.reset_peak_memory_stats(self.plan.device)
        try:
            row = two_steps(f"Qwen/Qwen3-{size}", self.plan.device, 16, TOKENS)
        except torch.OutOfMemoryError as error:
            raise Skipped(f"does not fit: {str(error).split('. ')[0]}") from error
        self.largest = size
        return {"checks": [], "rows": [row]}


def cases(plan: Plan) -> list[Case]:
    sizes = Sizes(plan)
    return [Case(size, minutes, partial(sizes.run, size)) for size, minutes in SIZES.items()]
