"""Student → samples by vLLM in the trainer's own process and on its GPU, asleep between calls.

A call wakes vLLM's weights, copies the student's into them, compares every parameter, wakes the
cache, samples, and puts vLLM to sleep again (level 2: weights and cache are released). vLLM starts
with dummy weights, so it never runs on anything but what was copied and compared.

What vLLM returns, and what becomes of it (sampler.py of vLLM 0.24 to 0.33):
* Its log-probs are those of the softmax before the temperature (`raw_logprobs`), or after it and
  after top-k and top-p (`processed_logprobs`). What this project wants, after the temperature and
  before the truncation, is the second one without a truncation, the first one at temperature 1, and
  otherwise neither, so such a configuration is refused.
* It returns no entropy. One teacher-forced forward of the student gives entropy and log-prob with
  the numerics of training; vLLM's own log-prob is kept beside them as `sampler_logprob`, and their
  ratio is the sampler mismatch of arXiv 2601.20802.
* Every sample has a seed of its own, a function of (seed, step, sample), so a resumed run asks for
  the same ones. Other engines draw other tokens from the same key, and vLLM's logits, and with them
  its tokens, may depend on what else is in its batch.

No GPU has seen this file: it was written against the sources of vLLM 0.33.0 and is tested with a
stand-in that has their signatures. That the student's memory, vLLM's sleep and its CUDA graphs
get along in one process is therefore what vLLM documents, not what was observed here.
"""

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sodfast.config import RolloutConfig
from sodfast.errors import RunFailed, UsageError
from sodfast.model.language_model import LanguageModel
from sodfast.model.packing import micro_batches
from sodfast.rollout.engine import (
    Progress,
    Sample,
    SampleKey,
    Sampling,
    check_prompts,
    stop_length,
)
from sodfast.rollout.scores import student_scores

# vLLM's sleep mode is CUDA's virtual memory management.
DEVICES = ("cuda",)
# vLLM's share of the memory that is free when it is built; the rest is for gradients, optimizer
# state and teacher, which do not exist yet. `rollout.cache_gib` bounds the cache itself.
MEMORY_SHARE = 0.6
# vLLM silently raises a lower temperature to this one.
MIN_TEMPERATURE = 0.01
# Tokens of one teacher-forced forward.
FORWARD_TOKENS = 16_384


class _Drawn(NamedTuple):
    """One answer as vLLM gave it, cut at its stop string."""

    prompt: Tensor
    response: Tensor  # [L]
    logprob: Tensor  # [L] fp32
    capped: bool


class VLLMEngine:
    """Implements `sodfast.rollout.engine.Engine`.

    Raises `UsageError` when vLLM is not installed, there is no GPU, or vLLM cannot run this model,
    this much context or this sampling.
    """

    name = "vllm"
    tokens_per_pass = None

    def __init__(self, model: LanguageModel, config: RolloutConfig) -> None:
        self.llm_class, self.params_class = _import_vllm()
        if model.device.type not in DEVICES:
            raise UsageError(f"rollout.engine=vllm needs a GPU, not {model.device}: use native")
        self.model = model
        self.mode = logprobs_mode(config)
        positions = model.network.config.max_position_embeddings
        self.width = min(config.max_prompt_tokens + config.max_new_tokens, positions)
        self.directory = _write_description(model)
        try:
            self.llm = self._build(config)
            self._sync()
        except (ValueError, RunFailed) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"rollout.engine=vllm cannot run this model: {reason}") from error
        self.llm.sleep(level=2)

    def _build(self, config: RolloutConfig) -> Any:
        # Its engine core in this process, where it can read the student's tensors.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        cache = None if config.cache_gib is None else int(config.cache_gib * 2**30)
        return self.llm_class(
            model=self.directory.name,
            dtype=str(self.model.head.dtype).removeprefix("torch."),
            load_format="dummy",
            max_model_len=self.width,
            max_num_seqs=config.batch_size,
            gpu_memory_utilization=MEMORY_SHARE * _free_share(self.model.device),
            kv_cache_memory_bytes=cache,
            enable_prefix_caching=True,
            enable_sleep_mode=True,
            logprobs_mode=self.mode,
        )

    def require(self, tokens: int) -> None:
        """See `Engine.require`."""
        if tokens > self.width:
            raise UsageError(
                f"rollout.engine=vllm: a sequence of {tokens} tokens exceeds the {self.width} "
                "that vLLM was built for, rollout.max_prompt_tokens + rollout.max_new_tokens"
            )

    def generate(
        self,
        prompts: Sequence[Tensor],
        samples: Sequence[int],
        sampling: Sampling,
        key: SampleKey,
        progress: Progress = lambda done, total: None,
    ) -> list[Sample]:
        """See `Engine.generate`. Raises `RunFailed`, too, when vLLM's weights are not the
        student's after copying them, or GPU memory runs out when it wakes."""
        check_prompts(prompts, sampling)
        self.require(max(len(prompt) for prompt in prompts) + sampling.max_new_tokens)
        params = [self._params(sampling, key, sample) for sample in samples]
        progress(0, len(prompts))
        with self._awake():
            outputs = self.llm.generate(
                [{"prompt_token_ids": prompt.tolist()} for prompt in prompts],
                params,
                use_tqdm=False,
            )
        drawn = [
            self._drawn(prompt, output.outputs[0], sampling)
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        finished = self._scored(drawn, sampling)
        progress(len(prompts), len(prompts))
        return finished

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """vLLM with the student's weights and an empty cache; asleep again afterwards."""
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()  # vLLM's memory comes from outside torch's pool
        try:
            with _out_of_memory_said():
                self.llm.wake_up(tags=["weights"])
            self._sync()
            with _out_of_memory_said():
                self.llm.wake_up(tags=["kv_cache"])
            # Its blocks were computed with the weights of an earlier call.
            if not self.llm.reset_prefix_cache():
                raise RunFailed(
                    "vLLM did not reset its prefix cache, which holds old weights' keys"
                )
            yield
        finally:
            self.llm.sleep(level=2)

    def _sync(self) -> None:
        """Copy the student's weights into vLLM's model and compare all of them."""
        student = dict(self.model.network.named_parameters(remove_duplicate=False))
        # A tied weight is copied once.
        weights = [(name, p.detach()) for name, p in self.model.network.named_parameters()]

        def copy_and_compare(network: Any) -> list[str]:
            network.load_weights(iter(weights))
            return different_parameters(network, student)

        for wrong in self.llm.apply_model(copy_and_compare):
            if wrong:
                raise RunFailed(
                    f"vLLM's weights are not the student's after copying them: {len(wrong)} "
                    f"parameters differ, such as {wrong[0]}; use rollout.engine=native or hf"
                )

    def _params(self, sampling: Sampling, key: SampleKey, sample: int) -> Any:
        if 0 < sampling.temperature < MIN_TEMPERATURE:
            raise UsageError(
                f"rollout.engine=vllm samples at a temperature of 0 or at least {MIN_TEMPERATURE}, "
                f"got {sampling.temperature}"
            )
        return self.params_class(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,  # 0: all
            seed=sample_seed(key, sample),
            max_tokens=sampling.max_new_tokens,
            # Our EOS ids and no others.
            ignore_eos=True,
            stop_token_ids=list(self.model.eos_ids),
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            detokenize=bool(sampling.stop),
            logprobs=0,  # that of the sampled token only
        )

    def _drawn(self, prompt: Tensor, output: Any, sampling: Sampling) -> _Drawn:
        response = torch.tensor(list(output.token_ids), dtype=torch.int64)
        pairs = zip(response.tolist(), output.logprobs, strict=True)
        logprob = torch.tensor([position[token].logprob for token, position in pairs])
        length = stop_length(self.model, response, sampling.stop)
        capped = length is None and output.finish_reason == "length"
        return _Drawn(prompt, response[:length], logprob[:length], capped)

    def _scored(self, drawn: Sequence[_Drawn], sampling: Sampling) -> list[Sample]:
        """Samples with the student's own log-probs and entropies.

        Raises `RunFailed` where the student's logits are not finite.
        """
        temperature = sampling.temperature or 1.0
        truncated = sampling.top_p < 1 or sampling.top_k is not None
        # Evaluations may sample in ways that vLLM has no log-prob for: no loss depends on it.
        comparable = sampling.temperature == 0 or (
            temperature == 1 if self.mode == "raw_logprobs" else not truncated
        )
        samples: dict[int, Sample] = {}
        lengths = [len(one.prompt) + len(one.response) for one in drawn]
        for batch in micro_batches(lengths, FORWARD_TOKENS):
            part = [drawn[index] for index in batch]
            scores = student_scores(
                self.model, [d.prompt for d in part], [d.response for d in part], temperature
            )
            for index, one, (logprob, entropy) in zip(batch, part, scores, strict=True):
                fields = (one.prompt, one.response, logprob, entropy, one.capped)
                samples[index] = Sample(*fields, one.logprob if comparable else None)
        return [samples[index] for index in range(len(drawn))]


def logprobs_mode(config: RolloutConfig) -> str:
    """The mode in which vLLM returns log-probs of the untruncated softmax at the temperature.

    Raises `UsageError` where there is none.
    """
    if config.top_p == 1 and config.top_k is None:
        return "processed_logprobs"
    if config.temperature == 1:
        return "raw_logprobs"
    raise UsageError(
        "rollout.engine=vllm returns no log-probs of the untruncated distribution at "
        f"rollout.temperature={config.temperature}: set rollout.temperature=1, or "
        "rollout.top_p=1 and no rollout.top_k, or use native"
    )


def sample_seed(key: SampleKey, sample: int) -> int:
    """63 bits, unrelated between samples, steps and seeds."""
    words = np.random.SeedSequence([key.seed, key.step, sample])
    return int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))


def different_parameters(network: Any, student: Mapping[str, Tensor]) -> list[str]:
    """Names of the parameters of vLLM's `network` that are not, bit for bit, the student's.

    vLLM stacks some of the student's weights into one, as `packed_modules_mapping` says, and
    appends rows to the vocabulary. A parameter under no name of the student's counts as different.
    """
    packed = getattr(network, "packed_modules_mapping", {})
    wrong = []
    for name, parameter in network.named_parameters():
        parts = [name]
        for whole, pieces in packed.items():
            if f".{whole}." in name:
                parts = [name.replace(f".{whole}.", f".{piece}.") for piece in pieces]
        if any(part not in student for part in parts):
            wrong.append(name)
            continue
        expected = torch.cat([student[part].detach() for part in parts]).to(parameter.dtype)
        if not torch.equal(parameter.detach()[: len(expected)], expected):
            wrong.append(name)
    return wrong


def _import_vllm() -> tuple[Any, Any]:
    try:
        from vllm import LLM, SamplingParams
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise UsageError(
            "rollout.engine=vllm: vLLM is not installed: pip install 'sodfast[vllm]'"
        ) from error
    return LLM, SamplingParams


def _write_description(model: LanguageModel) -> tempfile.TemporaryDirectory[str]:
    """The student's config and tokenizer, without weights, for as long as the result lives."""
    directory = tempfile.TemporaryDirectory(prefix="sodfast-vllm-")
    config = copy.deepcopy(model.network.config)
    config.architectures = [type(model.network).__name__]
    config.save_pretrained(directory.name)
    model.tokenizer.save_pretrained(directory.name)
    return directory


def _free_share(device: torch.device) -> float:
    free, total = torch.cuda.mem_get_info(device)
    return free / total


@contextmanager
def _out_of_memory_said() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of torch, or of vLLM's allocator, which has no class for it
        if "out of memory" not in str(error).lower():
            raise
        raise RunFailed(
            "GPU memory ran out when vLLM woke: lower rollout.cache_gib or "
            "optimizer.micro_batch_tokens"
        ) from error
