"""Which engine a run samples with."""

from collections.abc import Callable

from sodfast.config import RolloutConfig
from sodfast.errors import UsageError
from sodfast.model.language_model import LanguageModel
from sodfast.rollout.engine import Engine
from sodfast.rollout.hf import HFEngine


def build_engine(
    config: RolloutConfig, model: LanguageModel, message: Callable[[str], None]
) -> Engine:
    """The configured engine; `auto` is `native` where it knows the architecture, else `hf`, and
    `message` is called with the reason.

    Raises `UsageError` when the engine that was asked for by name cannot run this model.
    """
    from sodfast.rollout.decoder import unsupported
    from sodfast.rollout.native import NativeEngine

    if config.engine == "vllm":
        from sodfast.rollout.vllm import VLLMEngine

        return VLLMEngine(model, config)
    reason = None if config.engine == "hf" else unsupported(model.network)
    if config.engine == "native" and reason is not None:
        raise UsageError(f"rollout.engine=native cannot run this model: {reason}; use auto or hf")
    if config.engine == "hf" or reason is not None:
        if reason is not None:
            message(f"rollout.engine: hf (slower), since native cannot run this model: {reason}")
        return HFEngine(model, config.batch_size)
    return NativeEngine(model, config.batch_size, config.cache_gib, config.speculate)
