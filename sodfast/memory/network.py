"""A configuration's model without its weights: its config.json, its network, and their sizes.

The network's tensors are torch's fake ones, which have a shape and a dtype and no bytes.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sodfast.config import Config, LoRAConfig
from sodfast.errors import UsageError
from sodfast.model import liger, lora
from sodfast.model.directory import name_no_code, read_config, refusing
from sodfast.model.language_model import recompute_layers, trained_parameters
from sodfast.model.packing import can_pack, use_packed_attention
from sodfast.model.random_weights import shape, shipped_shapes
from sodfast.parallel.offload import block_bytes, blocks

# Lengths and ids may be real tensors, so that the phases can read them.
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def architecture(config: Config) -> dict[str, Any]:
    """The contents of the model's config.json: the lab's, a directory's, the hub cache's, or a
    shipped shape.

    Raises `UsageError` where there is none.
    """
    path = config.model.path
    if config.model.random is not None:
        return shape(config.model.random)
    if path is None:
        from sodfast.lab import model as lab

        return lab.architecture(config.lab).to_dict()
    known = shipped_shapes()
    if path in known:
        return known[path]
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        try:
            found = try_to_load_from_cache(path, "config.json")
        except ValueError:  # no id at all
            found = None
        if not isinstance(found, str):
            raise UsageError(
                f"model.path={path}: a plan needs the model's config.json: give a directory that "
                f"holds it, or one of {', '.join(known)}"
            )
        file = Path(found)
    return read_config(file.parent, f"model.path={path}")


@cache
def empty_network(
    contents: str,
    dtype: torch.dtype,
    recompute: bool,
    use_liger: bool,
    adapters: LoRAConfig | None = None,
    kept: int = 0,
) -> Any:
    """A network without weights, set up as `commands.build_model` sets up one that has some.

    `contents`: of a config.json. `use_liger`: with Liger's kernels where they are installed and
    know the network; without them it takes more. `kept`: how many layers `recompute` spares.
    Raises `UsageError` for a network that transformers does not know or that cannot be trained
    here.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with refusing(
        "model.path: its config.json makes no model", "give that of a causal language model"
    ):
        config = AutoConfig.for_model(**json.loads(contents))
        name_no_code(config)
        with FAKE, no_init_weights():
            network = AutoModelForCausalLM.from_config(config, dtype=dtype)
        network.tie_weights()
    if not can_pack(network):
        raise UsageError(
            f"model.path: sequences of a {type(network).__name__} cannot be packed: choose "
            "another model"
        )
    use_packed_attention(network.eval())
    if adapters is not None:
        lora.require_peft()
        lora.inject_adapters(network, adapters, seed=0)
        for module in network.modules():  # peft gives the adapters that it adds real memory
            for name, parameter in module.named_parameters(recurse=False):
                if not isinstance(parameter, FakeTensor):
                    fake = FAKE.from_tensor(parameter.detach())
                    module.register_parameter(name, nn.Parameter(fake, parameter.requires_grad))
    if use_liger and liger.unsupported(network, torch.device("cuda")) is None:
        liger.patch(network)
    if recompute:
        recompute_layers(network, kept)
    return network


@cache
def parameter_sizes(network: Any) -> tuple[int, int, int]:
    """How many numbers a network has, their bytes, and the bytes of those that are trained."""
    parameters = list(network.parameters())
    trained = trained_parameters(network).values()
    return (
        sum(p.numel() for p in parameters),
        sum(p.nbytes for p in parameters),
        sum(p.nbytes for p in trained),
    )


@cache
def block_sizes(network: Any) -> tuple[list[int], list[int]]:
    """Bytes of each layer of the decoder, and of each run of other parameters."""
    found = [(layer is not None, block_bytes(parameters)) for layer, parameters in blocks(network)]
    return [size for inside, size in found if inside], [
        size for inside, size in found if not inside
    ]
