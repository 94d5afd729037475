"""A stand-in for vLLM on a CPU: the names, arguments and results that `sodfast.rollout.vllm` uses,
as vLLM 0.33.0 declares them, around a Qwen3 whose weights are stacked as vLLM stacks them.

What sleeps is filled with NaN, so whoever forgets to wake, copy or reset something is found out.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, Qwen3ForCausalLM

VOCABULARY_PADDING = 64


@dataclass
class SamplingParams:
    """The fields that are set by name, and no others."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput] = field(default_factory=list)


class Network(nn.Module):
    """Parameters named and stacked as in vLLM's Qwen3ForCausalLM, tied embeddings once."""

    packed_modules_mapping = {  # noqa: RUF012
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.shapes = {name: p.shape for name, p in Qwen3ForCausalLM(config).named_parameters()}
        self.config = config
        self.tensors: dict[str, nn.Parameter] = {}
        for name, shape in self.shapes.items():
            stacked, _ = self._place(name)
            rows = sum(self.shapes[part][0] for part in self._parts(stacked))
            if "embed_tokens" in name:
                rows = -(-rows // VOCABULARY_PADDING) * VOCABULARY_PADDING
            value = torch.full((rows, *shape[1:]), 1e-3, dtype=dtype)  # as of load_format=dummy
            self.tensors.setdefault(stacked, nn.Parameter(value))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter(self.tensors.items())

    def _parts(self, stacked: str) -> list[str]:
        for whole, pieces in self.packed_modules_mapping.items():
            if f".{whole}." in stacked:
                return [stacked.replace(whole, piece) for piece in pieces]
        return [stacked]

    def _place(self, name: str) -> tuple[str, slice]:
        for whole, pieces in self.packed_modules_mapping.items():
            for piece in pieces:
                if f".{piece}." in name:
                    stacked = name.replace(piece, whole)
                    parts = self._parts(stacked)
                    start = sum(self.shapes[part][0] for part in parts[: parts.index(name)])
                    return stacked, slice(start, start + self.shapes[name][0])
        return name, slice(0, self.shapes[name][0])

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = set()
        for name, value in weights:
            stacked, rows = self._place(name)
            self.tensors[stacked].data[rows].copy_(value)
            loaded.add(stacked)
        return loaded

    def runnable(self) -> Qwen3ForCausalLM:
        network = Qwen3ForCausalLM(self.config).eval()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                stacked, rows = self._place(name)
                parameter.copy_(self.tensors[stacked][rows])
        return network


class LLM:
    """Records its arguments and the order of its calls in `arguments` and `calls`."""

    newest: "LLM"
    network_class: type[Network] = Network

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        kv_cache_memory_bytes: int | None = None,
        # Arguments of EngineArgs, which take the way of **kwargs in vLLM.
        load_format: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        enable_prefix_caching: bool | None = None,
        enable_sleep_mode: bool = False,
        logprobs_mode: str = "raw_logprobs",
    ) -> None:
        self.arguments = {k: v for k, v in locals().items() if k != "self"}
        config = AutoConfig.from_pretrained(model)
        assert config.architectures == ["Qwen3ForCausalLM"] and load_format == "dummy"
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.network = self.network_class(config, getattr(torch, dtype))
        self.logprobs_mode, self.max_model_len = logprobs_mode, max_model_len
        self.awake = {"weights", "kv_cache"}
        self.prefixes: set[tuple[int, ...]] = set()
        self.params: list[SamplingParams] = []
        self.calls: list[str] = []
        LLM.newest = self

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        self.calls.append(f"sleep {level}")
        self.awake.clear()
        for parameter in self.network.tensors.values():
            parameter.data.fill_(torch.nan)

    def wake_up(self, tags: list[str] | None = None) -> bool:
        self.calls.append(f"wake {tags}")
        self.awake |= set(tags or ("weights", "kv_cache"))
        return self.awake == {"weights", "kv_cache"}

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        self.calls.append("reset")
        self.prefixes.clear()
        return True

    def apply_model(self, func: Callable[[nn.Module], Any]) -> list[Any]:
        assert "weights" in self.awake
        self.calls.append("apply")
        return [func(self.network)]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        assert self.awake == {"weights", "kv_cache"} and not self.prefixes
        assert len(prompts) == len(sampling_params)
        self.calls.append("generate")
        self.params = list(sampling_params)
        network = self.network.runnable()
        outputs = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            assert self.max_model_len is not None and params.max_tokens is not None
            assert len(prompt["prompt_token_ids"]) + params.max_tokens <= self.max_model_len
            self.prefixes.add(tuple(prompt["prompt_token_ids"]))
            output = self._answer(network, prompt["prompt_token_ids"], params)
            outputs.append(RequestOutput([output]))
        return outputs

    def _answer(
        self, network: Qwen3ForCausalLM, prompt: list[int], params: SamplingParams
    ) -> CompletionOutput:
        generator = torch.Generator()
        if params.seed is not None:
            generator.manual_seed(params.seed)
        assert params.ignore_eos and params.max_tokens is not None
        tokens: list[int] = []
        logprobs: list[dict[int, Logprob]] = []
        reason: str | None = None
        while reason is None:
            logits_V = network(torch.tensor([prompt + tokens])).logits[0, -1].float()
            token, logprob = self._draw(logits_V, params, generator)
            tokens.append(token)
            logprobs.append({token: Logprob(logprob)})
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if token in (params.stop_token_ids or []):
                reason = "stop"
            elif any(stop in text for stop in params.stop or []):
                assert params.detokenize
                reason = "stop"
            elif len(tokens) == params.max_tokens:
                reason = "length"
        return CompletionOutput(0, "", tokens, None, logprobs, reason)

    def _draw(
        self, logits_V: Tensor, params: SamplingParams, generator: torch.Generator
    ) -> tuple[int, float]:
        raw_V = logits_V.log_softmax(0)
        if params.temperature == 0:
            token = int(raw_V.argmax())
            return token, float(raw_V[token])
        processed_V = (logits_V / params.temperature).log_softmax(0)
        order = processed_V.argsort(descending=True)
        mass = processed_V[order].exp()
        cut = mass.cumsum(0) - mass >= params.top_p
        if params.top_k > 0:
            cut[params.top_k :] = True
        processed_V[order[cut]] = -torch.inf
        processed_V = processed_V.log_softmax(0)
        noise = torch.empty_like(processed_V).exponential_(generator=generator)
        token = int((processed_V.exp() / noise).argmax())
        chosen = raw_V if self.logprobs_mode == "raw_logprobs" else processed_V
        return token, float(chosen[token])


def module(llm: type[LLM] = LLM) -> ModuleType:
    stand_in = ModuleType("vllm")
    stand_in.LLM, stand_in.SamplingParams = llm, SamplingParams  # type: ignore[attr-defined]
    return stand_in
