"""TRL's SDPO loss with its gradients, by TRL's own path and after `use_fused_loss`.

    python bench/bench_trl.py [--device cuda] [--out FILE.json]        (needs the extra `trl`)

Model, teacher, batch and settings are the same, and the two take turns; medians. Each row is one
micro-batch: the forward passes of student and teacher, the loss, and the backward pass. Answers
have no padding, which TRL computes and the fused loss leaves out. The last line is JSON.

On a CPU: vocabulary 32,000, 8 answers of 256 tokens, fp32, a model small enough that the loss
matters. On a GPU: the shape of Qwen3-0.6B with its vocabulary of 151,936, 8 answers of 1,024
tokens, bf16.
"""

import argparse
import ctypes
import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from suite_timing import clock
from torch import Tensor

from sodfast.integrations.trl import use_fused_loss
from sodfast.run.environment import environment, versions

MODES: dict[str, dict[str, Any]] = {
    "full vocabulary": {"distillation_mode": "full_logits"},
    "top-20 and tail": {
        "distillation_mode": "topk_logits",
        "distillation_topk": 20,
        "distillation_add_tail": True,
    },
}
ROUNDS = 3


class Size(NamedTuple):
    """The model, and a micro-batch: `answers` of `tokens` after prompts of half that length."""

    model: dict[str, Any]
    dtype: torch.dtype
    answers: int
    tokens: int


CPU = Size(
    {
        "vocab_size": 32_000,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    torch.float32,
    8,
    256,
)
GPU = Size(
    {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    torch.bfloat16,
    8,
    1024,
)


def measure(
    size: Size, device: torch.device, rounds: int, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each mode and path."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(size, Path(folder) / "model")
        batch = make_batch(size, device)
        for mode, settings in MODES.items():
            both = {
                path: build_trainer(size, Path(folder), device, settings, fused)
                for path, fused in (("TRL's own", False), ("fused", True))
            }
            turns: dict[str, list[dict[str, float]]] = {path: [] for path in both}
            for number in range(1 + rounds):  # the first turn warms up
                for path, trainer in both.items():
                    found = turn(trainer, batch, device)
                    if number:
                        turns[path].append(found)
            for path, taken in turns.items():
                row = {key: median(one[key] for one in taken) for key in taken[0]}
                rows.append({"mode": mode, "path": path, **row})
                progress(json.dumps(rows[-1]))
            del both
    return rows


def turn(trainer: Any, batch: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    """Seconds, the CPU's seconds, and the peak in bytes above what was held before, which is the
    weights: gradients count."""
    trainer.model.zero_grad(set_to_none=True)
    gc.collect()
    held = start_memory(device)
    cpu, start = time.process_time(), clock(device)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    seconds, cpu = clock(device) - start, time.process_time() - cpu
    peak = peak_memory(device) - held
    squares = [p.grad.double().square().sum() for p in trainer.model.parameters()]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_bytes": peak,
        "loss": float(loss.detach()),
        "gradient_norm": float(sum(squares)) ** 0.5,
    }


def start_memory(device: torch.device) -> int:
    """Forget the peak so far; the bytes that are held now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)  # what earlier turns have freed
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins anew
    return resident("VmRSS")


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident("VmHWM")


def resident(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def save_model(size: Size, folder: Path) -> None:
    """TRL loads its teacher from where the student came from."""
    from forced_run import word_tokenizer
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    tokenizer = word_tokenizer(size.model["vocab_size"])
    config = Qwen3Config(
        **size.model, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None
    )
    Qwen3ForCausalLM(config).to(size.dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_batch(size: Size, device: torch.device) -> dict[str, Tensor]:
    """What TRL makes of a generation: the teacher's prompts are longer by a demonstration."""
    generator = torch.Generator().manual_seed(1)

    def words(tokens: int) -> Tensor:
        shape = size.answers, tokens
        return torch.randint(2, size.model["vocab_size"], shape, generator=generator).to(device)

    prompt, hint, answer = words(size.tokens // 2), words(size.tokens * 3 // 2), words(size.tokens)
    shown = torch.cat([hint, answer], 1)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": answer,
        "completion_mask": torch.ones_like(answer),
        "teacher_input_ids": shown,
        "teacher_attention_mask": torch.ones_like(shown),
        "self_distillation_mask": torch.ones(size.answers, device=device),
    }


def build_trainer(
    size: Size, folder: Path, device: torch.device, settings: dict[str, Any], fused: bool
) -> Any:
    from transformers import AutoTokenizer
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    trainer = SDPOTrainer(
        model=str(folder / "model"),
        args=SDPOConfig(
            output_dir=str(folder / "run"),
            model_init_kwargs={"dtype": size.dtype},
            per_device_train_batch_size=size.answers,
            num_generations=size.answers,
            distillation_alpha=0.5,
            bf16=False,
            use_cpu=device.type == "cpu",
            report_to=[],
            **settings,
        ),
        reward_funcs=lambda completions, **others: [0.0] * len(completions),
        train_dataset=[{"prompt": "w2 w3"}],
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    if fused:
        use_fused_loss(trainer)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = torch.device(given.device)
    size = GPU if device.type == "cuda" else CPU
    result = {
        "model": size.model,
        "dtype": str(size.dtype),
        "answers": size.answers,
        "tokens": size.tokens,
        "rounds": ROUNDS,
        "rows": measure(size, device, ROUNDS, lambda text: print(text, flush=True)),
        "environment": environment(torch.get_num_threads(), str(device)),
        "trl": versions(["trl", "accelerate", "datasets"]),
    }
    if device.type == "cuda":
        result["gpu"] = torch.cuda.get_device_name(device)
    text = json.dumps(result, indent=1)
    if given.out:
        given.out.write_text(text + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
