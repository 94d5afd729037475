"""Qwen3-8B on one 80 GB GPU: full steps of the preset, against the plan and the hardware.

    python bench/bench_8b.py          one GPU with 78 GiB or more; about 8 minutes
    python bench/bench_8b.py --trl    one step of TRL's SDPO trainer, the largest Qwen3 that fits

No GPU has run it yet. The weights are random, since the architecture is what is measured, and the
allocator is capped at 78 GiB whatever the card has. In one process:

* three steps of the preset, 16 × 4 responses from the native engine, forced to lengths of 1.5k
  tokens on average, some of them at the cap of 8192. Every second one counts as right, so that
  each has a gradient and each a demonstration;
* seconds, tokens a second and peak bytes of each phase, beside `sodfast plan`'s bytes;
* model FLOP utilisation of the training phase: the products that the model needs, without what
  checkpointing computes again, over the matrix rate measured in the same process;
* the teacher scores the last step's responses streamed from the host and resident on the device:
  the share of the transfer that streaming hides;
* at the shape of Qwen3-0.6B, loss, entropy and gradients of the fused objective beside the
  definition in fp32 on the same hidden states.

Writes 8b.json (or trl.json) to $OUT (bench/results/<gpu>/ if unset). The last line is JSON; exit
code 1 if a target is missed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bench_rollout import Shape, build, clock, target
from sodfast_kernels import linear_distillation_loss, reference
from torch import Tensor

from sodfast.config import load_config
from sodfast.context import Questions
from sodfast.memory.estimate import Estimate, Lengths
from sodfast.model.liger import use_liger
from sodfast.model.load import LanguageModel, recompute_layers, wrap_model
from sodfast.model.packing import micro_batches, response_hidden
from sodfast.parallel.offload import HostCopy
from sodfast.rollout import native
from sodfast.rollout.native import NativeEngine
from sodfast.run.console import Reporter
from sodfast.run.directory import RunDirectory
from sodfast.run.environment import environment
from sodfast.run.interrupt import Interruption
from sodfast.run.loggers import Logger
from sodfast.tasks.base import Question
from sodfast.teacher import Teacher
from sodfast.trainer import Rollouts, Trainer

Progress = Callable[[str], None]
GIB = 2**30
BUDGET_GIB = 78.0
SMALL = Shape(1024, 3072, 28, 16, 8, 128)  # Qwen3-0.6B, its embeddings untied
SIZES = {  # what TRL may have, the largest first
    "8B": Shape(),
    "4B": Shape(2560, 9728, 36, 32, 8, 128),
    "1.7B": Shape(2048, 6144, 28, 16, 8, 128),
    "0.6B": SMALL,
}
UTILISATION, HIDDEN_SHARE, COSINE = 0.45, 0.90, 0.999
TRL_TOKENS = 2048  # its answers run to the cap, one token of the whole batch at a time


# ---------------------------------------------------------------- a run whose lengths are given


class ForcedBatch(native.Batch):
    """Ends each answer at the length of its sample, whatever its tokens are."""

    lengths: Tensor

    def _draw(self, first: int, last: int, logits_BV: Tensor, noise_BV: Tensor | None) -> None:
        super()._draw(first, last, logits_BV, noise_BV)
        rows = slice(first, last)
        self.done[rows] |= self.count[rows] >= self.lengths[self.sample[rows]]


class HalfRight:
    """Questions of random words; every second answer that is scored counts as right."""

    name = "half_right"

    def __init__(self, vocabulary: int, count: int, words: int) -> None:
        generator = np.random.default_rng(0)
        rows = generator.integers(2, vocabulary, (count, words))
        self.train = [Question(_text(row), "", None, str(i)) for i, row in enumerate(rows)]
        self.test = self.train[:1]
        self.scored = 0

    def score(self, question: Question, response: str) -> float:
        self.scored += 1
        return float(self.scored % 2)

    def feedback(self, question: Question, response: str) -> str | None:
        return None

    def extract(self, response: str) -> str | None:
        return None


def _text(ids: Sequence[int]) -> str:
    return " ".join(f"w{token}" for token in ids)


def word_tokenizer(vocabulary: int) -> Any:
    """One word for each id, so that any answer can be shown to the teacher at its own length."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{token}": token for token in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1")


def forced_lengths(count: int, mean: int, cap: int, at_cap: int) -> list[int]:
    """`at_cap` of the `count` lengths at least are the cap, the rest exponential up to it; their
    mean is `mean`."""
    others = np.random.default_rng(1).exponential(size=count - at_cap)
    for _ in range(50):  # what the cap takes away makes the others longer
        others *= (count * mean - at_cap * cap) / others.clip(1, cap).sum()
    return [cap] * at_cap + [int(n) for n in others.clip(1, cap).round()]


@dataclass(frozen=True)
class Case:
    """What is run: a preset with overrides at a shape, and the lengths of its answers."""

    preset: str
    overrides: tuple[str, ...]
    shape: Shape
    dtype: torch.dtype
    prompt_words: int
    mean_length: int
    at_cap: int


EIGHT_B = Case("qwen3_8b_80gb", (), Shape(), torch.bfloat16, 250, 1500, 3)


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    network = build(shape, device, dtype, 0.02).network
    return wrap_model(network, word_tokenizer(shape.vocabulary), device, "random weights")


def start(case: Case, device: torch.device, folder: Path) -> tuple[Trainer, list[Rollouts]]:
    """A trainer ready for its first step, and the list that its rollouts will be added to."""
    task = HalfRight(case.shape.vocabulary, 64, case.prompt_words)
    model = replace(random_model(case.shape, device, case.dtype), eos_ids=())
    model.network.config.save_pretrained(folder / "model")  # for the plan
    overrides = [f"device={device.type}", f"model.path={folder / 'model'}", *case.overrides]
    config = load_config(case.preset, overrides)
    use_liger(model.network, config.model.liger, print)
    if config.model.gradient_checkpointing:
        recompute_layers(model.network)
    rollout = config.rollout
    answers = rollout.prompts_per_step * rollout.samples_per_prompt
    lengths = forced_lengths(answers, case.mean_length, rollout.max_new_tokens, case.at_cap)
    ForcedBatch.lengths = torch.tensor(lengths, device=device)
    native.Batch = ForcedBatch  # type: ignore[misc]
    engine = NativeEngine(model, rollout.batch_size, rollout.cache_gib)
    data = Questions(task.train, task.test, 0, case.prompt_words)
    run = RunDirectory.create(
        folder / "run", config, environment(torch.get_num_threads(), str(device))
    )
    trainer = Trainer(config, model, engine, task, data, run, Reporter())
    seen: list[Rollouts] = []
    original = trainer._rollout

    def watched(step: int) -> Rollouts:
        seen[:] = [original(step)]
        return seen[0]

    trainer._rollout = watched  # type: ignore[method-assign]
    return trainer, seen


def take_steps(case: Case, device: torch.device, count: int, progress: Progress) -> dict[str, Any]:
    """Full steps, their phases beside the plan, and the teacher's streaming afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, seen = start(case, device, Path(folder))
        logger, interruption = Logger(trainer.config, trainer.run.path), Interruption()
        lines = []
        for step in range(1, count + 1):
            trainer._train_step(step, interruption, logger)
            lines.append(trainer.lines[-1])
            progress(json.dumps(lines[-1]))
        (rollouts,) = seen
        flops = training_flops(case.shape, rollouts)
        streaming = stream_teacher(trainer, rollouts) if device.type == "cuda" else None
        trainer.run.close()
        planned = Estimate(trainer.config, lengths_of(rollouts))
    later = lines[1:]  # the first step compiles
    phases = {}
    for phase in ("rollout", "teacher", "train"):
        phases[phase] = {
            "seconds": median(line[f"time/{phase}"] for line in later),
            "peak_bytes": max(line.get(f"memory/peak_{phase}_bytes", 0) for line in lines),
            "planned_bytes": planned.peaks[phase],
        }
    return {
        "preset": case.preset,
        "responses": len(rollouts.samples),
        "response_tokens": sum(len(sample.response) for sample in rollouts.samples),
        "longest": max(len(sample.response) for sample in rollouts.samples),
        "seconds": median(line["time/step"] for line in later),
        "tokens_per_second": median(line["time/tokens_per_second"] for line in later),
        "phases": phases,
        "training_flops": flops,
        "training_flops_per_second": flops / phases["train"]["seconds"],
        "streaming": streaming,
        "lines": lines,
    }


def lengths_of(rollouts: Rollouts) -> list[Lengths]:
    return [
        Lengths(len(sample.prompt), None if context is None else len(context), len(sample.response))
        for sample, context in zip(rollouts.samples, rollouts.contexts, strict=True)
    ]


def training_flops(shape: Shape, rollouts: Rollouts) -> float:
    """Products of forward and backward (three times the forward's), prompt tokens included; the
    head sees the responses only, and the teacher's head its forward."""
    layer = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    layer += 3 * shape.hidden * shape.inner
    flops = 0.0
    for sample in rollouts.samples:
        tokens = len(sample.prompt) + len(sample.response) - 1
        # Causal attention: two products of T²/2 · A · D, two flops each.
        attention = 2 * tokens**2 * shape.heads * shape.head_dim
        flops += 3 * shape.layers * (2 * layer * tokens + attention)
        flops += (3 + 1) * 2 * shape.hidden * shape.vocabulary * len(sample.response)
    return flops


def stream_teacher(trainer: Trainer, rollouts: Rollouts) -> dict[str, Any]:
    """Seconds to score the rollouts from the host and from the device, and of the transfers."""
    device, config = trainer.model.device, trainer.config
    responses = [sample.response for sample in rollouts.samples]

    def seconds(teacher: Teacher) -> float:
        def score() -> float:
            begin = clock(device)
            teacher.score(rollouts.contexts, responses, config.optimizer.micro_batch_tokens)
            return clock(device) - begin

        score()
        return median(score() for _ in range(3))

    store = trainer.teacher.store
    assert isinstance(store, HostCopy)
    blocks = [block for block in store.blocks if block.layer is not None]
    bytes_once = sum(block.memory.nbytes for block in blocks)
    lengths = [len(c) + len(r) for c, r in zip(rollouts.contexts, responses, strict=True)]
    passes = len(list(micro_batches(lengths, config.optimizer.micro_batch_tokens)))
    staged = torch.empty_like(blocks[0].memory, device=device)
    begin = clock(device)
    for block in blocks:
        staged.copy_(block.memory, non_blocking=True)
    transfer = passes * (clock(device) - begin)
    host = seconds(trainer.teacher)
    resident = Teacher(trainer.model.network, config.schedule, config.seed, "device")
    resident.prepare_update()
    on_device = seconds(resident)
    return {
        "micro_batches": passes,
        "bytes_a_pass": bytes_once,
        "transfer_seconds": transfer,
        "host_seconds": host,
        "device_seconds": on_device,
        "hidden_share": 1 - max(0.0, host - on_device) / transfer,
    }


# ---------------------------------------------------------------- the objective alone


def agreement(shape: Shape, device: torch.device, dtype: torch.dtype, rows: int) -> dict[str, Any]:
    """The fused objective in `dtype` beside the definition in fp32, on the same hidden states:
    relative errors of loss and entropy, cosines of the gradients."""
    model = random_model(shape, device, dtype)
    generator = torch.Generator().manual_seed(3)
    ids = list(torch.randint(2, shape.vocabulary, (8, 32 + rows // 8), generator=generator))
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
    return {
        "rows": len(targets),
        "loss_error": abs(ours[0] / exact[0] - 1),
        "entropy_error": abs(ours[1] / exact[1] - 1),
        "hidden_cosine": cosine(ours[2], exact[2], dim=0).item(),
        "head_cosine": cosine(ours[3], exact[3], dim=0).item(),
    }


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Flops a second of a square product, the median of 20."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(23):
        begin = clock(device)
        a @ b
        times.append(clock(device) - begin)
    return 2 * size**3 / median(times[3:])


# ---------------------------------------------------------------- TRL


def trl_step(
    name: str, shape: Shape, device: torch.device, prompts: int, tokens: int
) -> dict[str, Any]:
    """Seconds and peak bytes of the second step of TRL's SDPO trainer at this shape."""
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    task = HalfRight(shape.vocabulary, prompts * 2, 250)
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        # Its teacher is loaded from where the model came from.
        build(shape, device, torch.bfloat16, 0.02).network.save_pretrained(f"{folder}/model")
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
            train_dataset=[{"prompt": q.prompt} for q in task.train],
            processing_class=word_tokenizer(shape.vocabulary),
        )
        trainer.train()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {
        "model": name,
        "responses": prompts * 4,
        "tokens_each": tokens,
        "seconds": times[-1] - times[-2],
        "peak_bytes": peak,
        "trl": version("trl"),
    }


def largest_trl(device: torch.device, progress: Progress) -> dict[str, Any]:
    """The first of SIZES that ends two steps, and what kept the larger ones from it."""
    failures = {}
    for name, shape in SIZES.items():
        torch.cuda.reset_peak_memory_stats(device)
        try:
            row = trl_step(name, shape, device, prompts=16, tokens=TRL_TOKENS)
            return {"largest": row, "did_not_fit": failures}
        except torch.OutOfMemoryError as error:
            failures[name] = str(error).split(". ")[0]
            progress(f"TRL, {name}: {failures[name]}")
        torch.cuda.empty_cache()
    return {"largest": None, "did_not_fit": failures}


# ---------------------------------------------------------------- together


def measure(device: torch.device, progress: Progress) -> dict[str, Any]:
    rate = matrix_rate(device, torch.bfloat16, 8192)
    progress(f"bf16 matrix rate: {rate / 1e12:.0f} Tflop/s")
    small = agreement(SMALL, device, torch.bfloat16, rows=2048)
    progress(json.dumps(small))
    torch.cuda.empty_cache()
    steps = take_steps(EIGHT_B, device, 3, progress)
    share = steps["training_flops_per_second"] / rate
    targets = [
        target("training phase: share of the matrix rate", share, UTILISATION),
        target("streaming: share of the transfer hidden", steps["streaming"]["hidden_share"],
               HIDDEN_SHARE),
        *(target(f"0.6B: {key}", small[key], COSINE) for key in ("hidden_cosine", "head_cosine")),
    ]  # fmt: skip
    for phase, row in steps["phases"].items():
        share = row["peak_bytes"] / row["planned_bytes"]
        targets.append(target(f"{phase}: peak over plan", share, 1.05, at_most=True))
        gib = row["peak_bytes"] / GIB
        targets.append(target(f"{phase}: peak GiB", gib, BUDGET_GIB, at_most=True))
    return {
        "device": torch.cuda.get_device_name(device),
        "matrix_flops_per_second": rate,
        "objective": small,
        "steps": steps,
        "targets": targets,
        "environment": environment(torch.get_num_threads(), "cuda"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Qwen3-8B on one 80 GB GPU")
    parser.add_argument("--trl", action="store_true", help="TRL's SDPO trainer instead")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/bench_8b.py needs a CUDA device")
        return 2
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device = torch.device("cuda")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, BUDGET_GIB * GIB / total))

    def progress(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    result = largest_trl(device, progress) if options.trl else measure(device, progress)
    name = torch.cuda.get_device_name(device).replace(" ", "-")
    folder = Path(os.environ.get("OUT", Path(__file__).parent / "results" / name))
    folder.mkdir(parents=True, exist_ok=True)
    file = "trl.json" if options.trl else "8b.json"
    (folder / file).write_text(json.dumps(result, indent=1))
    targets = result.get("targets", [])
    for row in targets:
        progress(f"{'met   ' if row['met'] else 'MISSED'} {row['target']:45} {row['value']:.4g}")
    print(json.dumps(result))
    return 0 if all(row["met"] for row in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
