"""LoRA (arXiv 2106.09685): adapters beside the linear layers of a frozen base.

    y = W·x + alpha/rank · B·(A·x)        A [rank, in] random, B [out, rank] zeros at first

The layers are peft's. Each takes the place of the linear layer that it wraps, so the network stays
what it was to everything else; its embedding and its head are frozen with the rest. Whoever asks
for `trained_parameters` finds A and B alone: the optimizer, the checkpoints, and the teacher, whose
own weights are a second set of adapters on the same base.

Adapters are fp32 whatever the base is: torch's AdamW is exact there, and they are small. Rank 16
beside every linear layer of Qwen3-8B is 43.6 M parameters; student, teacher, gradients and both
moments take 0.9 GB, where full fine-tuning in bf16 with 8-bit moments takes 66 GB.
"""

import hashlib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from sodfast.config import LoRAConfig
from sodfast.errors import UsageError
from sodfast.model.language_model import LanguageModel, trained_parameters
from sodfast.rng import Stream, draw_key

ADAPTER = "default"  # peft's name for the only adapter of a network


def require_peft() -> None:
    """Raise `UsageError` where peft is missing."""
    if find_spec("peft") is None:
        raise UsageError("model.lora needs a package: pip install 'sodfast[lora]'")


def add_adapters(model: LanguageModel, config: LoRAConfig, seed: int) -> LanguageModel:
    """The model with its weights frozen and new adapters in its network, which is changed in
    place and, since B is 0, still computes the same.

    A is drawn on the CPU by a stream keyed by `seed`, so it is the same on every device. Raises
    `UsageError` for a target that the model does not have.
    """
    base = weights_hash(model.network)
    inject_adapters(model.network, config, seed)
    return replace(model, base=base)


def inject_adapters(network: Any, config: LoRAConfig, seed: int) -> None:
    """Freeze the network's weights and put new adapters into it, in place.

    Raises `UsageError` as `add_adapters` does.
    """
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        task_type="CAUSAL_LM",
        target_modules=_target_paths(network, config.targets),
        base_model_name_or_path=network.name_or_path or None,
    )
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(draw_key(seed, Stream.ADAPTERS))
        inject_adapter_in_model(settings, network, ADAPTER)
    for parameter in trained_parameters(network).values():
        parameter.data = parameter.data.float()  # peft gives them the base's dtype
    network.eval()


def _target_paths(network: Any, names: tuple[str, ...] | None) -> list[str]:
    """Paths in `network` of the body's linear layers with these names; None: of all of them."""
    body = set(network.base_model.modules())
    paths = [p for p, m in network.named_modules() if m in body and type(m) is nn.Linear]
    known = {_last(path) for path in paths}
    unknown = sorted(set(names or ()) - known)
    if unknown or not known:
        raise UsageError(
            f"model.lora.targets: {', '.join(unknown) or 'nothing'} among the linear layers of "
            f"this {type(network).__name__}'s decoder, which are {', '.join(sorted(known)) or '-'}"
        )
    return [path for path in paths if names is None or _last(path) in names]


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def weights_hash(network: nn.Module) -> str:
    """16 hexadecimal digits that tell these weights from others: names, dtypes, shapes, values."""
    named = list(network.named_parameters())
    hashes = [torch.hash_tensor(parameter.detach()) for _, parameter in named]
    values = torch.stack(hashes).tolist()  # one wait for the device
    lines = [f"{n} {p.dtype} {list(p.shape)} {v}" for (n, p), v in zip(named, values, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def save_adapters(network: Any, directory: Path) -> None:
    """Write the adapters as peft does: adapter_model.safetensors and adapter_config.json."""
    directory.mkdir()
    trained = trained_parameters(network)
    tensors = {peft_name(name): p.detach().contiguous() for name, p in trained.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    network.peft_config[ADAPTER].save_pretrained(directory)


def peft_name(name: str) -> str:
    """What peft's files call a parameter of an adapter."""
    return "base_model.model." + name.replace(f".{ADAPTER}.", ".")


@torch.no_grad()
def merge_adapters(network: Any) -> None:
    """W ← W + alpha/rank · B·A, summed in fp32 and rounded once to the dtype of W; the network is
    a plain one again."""
    from peft.tuners.lora import LoraLayer

    for path, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            linear = module.get_base_layer()
            linear.weight += module.get_delta_weight(ADAPTER)
            setattr(network.get_submodule(path.rpartition(".")[0]), _last(path), linear)
    del network.peft_config
