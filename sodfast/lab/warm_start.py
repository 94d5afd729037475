"""The embedded lab: a character tokenizer, a tiny Qwen3 and its supervised warm start.

The warm start leaves one model that has much to learn as a student and much to say as a teacher.

* Without a demonstration the model has many separate misconceptions: each entry of the times
  table and each carry has its own wrong result and its own probability of coming out wrong.
  Unlearning one says little about the next, so no single hidden switch solves the task.
* Shown a right solution (`TEACHER_TEMPLATE`) it solves the question in a way of its own: it may
  check its result, and it checks again after a pass that went wrong. `lab.stubborn` misconceptions
  stay: what a demonstration cannot cure comes out wrong as often as without one, with no pass more.

A response has one or more passes (see `sodfast.tasks.arithmetic`). A later pass errs less than an
earlier one, and so the length of a response is something that training can move.

Suffixes of numeric names: B rows, T tokens, V vocabulary.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sodfast.config import LabConfig
from sodfast.files import alone, replace_bytes
from sodfast.lab.model import EOS, PAD, VOCABULARY, build_tokenizer, new_model
from sodfast.rng import generator
from sodfast.tasks.arithmetic import ADDENDS, LEFT_FACTORS, RIGHT_FACTORS, question_pools

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

# Part of the cache key: raise it when a change to this file changes the warm-started weights.
CODE_VERSION = 3

# What the teacher sees: the question, a right solution, and the question again.
TEACHER_TEMPLATE = "{prompt}{demonstration}|{prompt}"

Progress = Callable[[str, int, int], None]
_IGNORED_LABEL = -100
# Streams of the lab's own seed: the tables of misconceptions, which of them are stubborn, and from
# _BATCHES on one per batch.
_TABLES, _STUBBORN, _BATCHES = 0, 1, 1 << 32
_ROW_TOKENS = 192
# The same number on every machine, because it decides the order of sums and so the weights' bits.
_WARM_START_THREADS = 2

_log = logging.getLogger(__name__)


class Misconceptions:
    """What the student gets wrong, how often, and how: fixed tables drawn from the seed.

    `products` maps two factors to (what a wrong product adds, probability of it); `sums` maps the
    last digit of the product and the addend to the probability of a wrong carry.
    `stubborn_products` and `stubborn_sums` are the keys of those that no demonstration cures.
    """

    def __init__(self, config: LabConfig) -> None:
        rng = generator(config.seed, _TABLES)
        self.error_decay = config.error_decay
        factors = list(itertools.product(LEFT_FACTORS, RIGHT_FACTORS))
        ones = list(itertools.product(range(10), ADDENDS))
        # Evenly spread probabilities in random order: their mean does not depend on the seed.
        product_errors = rng.permutation(np.linspace(*config.product_error, len(factors)))
        sum_errors = rng.permutation(np.linspace(*config.sum_error, len(ones)))
        shifts = rng.choice((-2, -1, 1, 2, 10), len(factors))
        mistakes = zip(shifts.tolist(), product_errors.tolist(), strict=True)
        self.products = dict(zip(factors, mistakes, strict=True))
        self.sums = dict(zip(ones, sum_errors.tolist(), strict=True))
        rng = generator(config.seed, _STUBBORN)
        self.stubborn_products, self.stubborn_sums = (
            {
                keys[index]
                for index in rng.permutation(len(keys))[: round(config.stubborn * len(keys))]
            }
            for keys in (factors, ones)
        )

    def product(self, left: int, right: int, attempt: int, rng: np.random.Generator) -> int:
        """Return the product of two factors, right or wrong; `attempt` counts from 0."""
        shift, probability = self.products[left, right]
        erred = rng.random() < probability * self.error_decay**attempt
        return left * right + shift * erred

    def sum(self, left: int, right: int, attempt: int, rng: np.random.Generator) -> int:
        """Return the sum of a product and an addend, right or with the carry wrong."""
        ones = left % 10
        erred = rng.random() < self.sums[ones, right] * self.error_decay**attempt
        return left + right + (-10 if ones + right >= 10 else 10) * erred


_Operands = tuple[int, int, int]
_Piece = tuple[str, bool]  # text, and whether it is right, or to be learned as if it were


class Example:
    """Token ids with labels, grown piece by piece; a piece that is not learned has no label."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.labels: list[int] = []

    def add(self, text: str, learned: bool) -> None:
        ids = [VOCABULARY[character] for character in text]
        self.ids += ids
        self.labels += ids if learned else [_IGNORED_LABEL] * len(ids)

    def end(self) -> None:
        self.ids.append(VOCABULARY[EOS])
        self.labels.append(VOCABULARY[EOS])


class WarmStartData:
    """Examples of the warm start: plain questions, and questions with a demonstration.

    Only questions of the train pool occur.
    """

    def __init__(self, config: LabConfig) -> None:
        self.config = config
        self.misconceptions = Misconceptions(config)
        self.questions = [
            (question.prompt, _operands(question.prompt), question.answer)
            for question in question_pools()[0]
        ]
        # Probability of stopping after pass k, given that pass k was reached.
        reached = np.cumsum(np.array(config.passes)[::-1])[::-1]
        self.stop_after = [float(p / r) for p, r in zip(config.passes, reached, strict=True)]

    def batch(self, index: int) -> list[list[Example]]:
        """Return the packed rows of batch `index`, a function of the seed and `index` alone."""
        rng = generator(self.config.seed, _BATCHES + index)
        rows: list[list[Example]] = []
        free = 0
        while True:
            example = self._example(rng)
            if len(example.ids) > free:
                if len(rows) == self.config.rows:
                    return rows
                rows.append([])
                free = _ROW_TOKENS
            rows[-1].append(example)
            free -= len(example.ids)

    def _example(self, rng: np.random.Generator) -> Example:
        prompt, operands, answer = self.questions[int(rng.integers(len(self.questions)))]
        if rng.random() < self.config.demonstrated_fraction:
            return self._demonstrated(prompt, operands, answer, rng)
        return self._plain(prompt, operands, answer, rng)

    def _plain(
        self, prompt: str, operands: _Operands, answer: str, rng: np.random.Generator
    ) -> Example:
        """Answer as the student does, misconceptions included."""
        example = Example()
        example.add(prompt, learned=False)
        count, is_long = self._pass_count(rng)
        for attempt in range(count):
            if attempt:
                # The `?` of a long response has no label: the model learns to continue a long
                # response without learning to write more of them.
                example.add("?", learned=not is_long)
            for text, _ in self._pass(operands, answer, attempt, rng):
                example.add(text, learned=True)
        example.end()
        return example

    def _demonstrated(
        self, prompt: str, operands: _Operands, answer: str, rng: np.random.Generator
    ) -> Example:
        """Answer rightly after a demonstration; wrong pieces are context, never a label."""
        demonstration = self._demonstration(operands, answer, rng)
        example = Example()
        example.add(
            TEACHER_TEMPLATE.format(prompt=prompt, demonstration=demonstration), learned=False
        )
        for attempt in range(self.config.long_passes):
            if attempt:
                example.add("?", learned=True)
            last = attempt == self.config.long_passes - 1
            if last or rng.random() < 0.7:
                pieces = self._cured_pass(operands, attempt, rng)
            else:
                pieces = self._pass(operands, answer, attempt, rng)
            for text, learned in pieces:
                example.add(text, learned)
            stop_after = self.stop_after[min(attempt, len(self.stop_after) - 1)]
            if pieces[-1][1] and rng.random() < stop_after:
                break
        example.end()
        return example

    def _cured_pass(
        self, operands: _Operands, attempt: int, rng: np.random.Generator
    ) -> list[_Piece]:
        """Return one pass as a demonstration makes it: right but for what is stubborn. It counts as
        right in any case, so that stubbornness alone adds no pass."""
        a, b, c = operands
        wrong = self.misconceptions
        product = wrong.product(a, b, attempt, rng) if (a, b) in wrong.stubborn_products else a * b
        stubborn = (product % 10, c) in wrong.stubborn_sums
        total = wrong.sum(product, c, attempt, rng) if stubborn else product + c
        return [(str(product), True), (f"+{c}=", True), (str(total), True)]

    def _demonstration(self, operands: _Operands, answer: str, rng: np.random.Generator) -> str:
        """Return a response of the student that ends right."""
        count, _ = self._pass_count(rng)
        passes = [self._pass(operands, answer, attempt, rng) for attempt in range(count)]
        while not passes[-1][-1][1]:
            passes[-1] = self._pass(operands, answer, count - 1, rng)
        return "?".join("".join(text for text, _ in pieces) for pieces in passes)

    def _pass_count(self, rng: np.random.Generator) -> tuple[int, bool]:
        if rng.random() < self.config.long_fraction:
            return int(rng.integers(1, self.config.long_passes, endpoint=True)), True
        return int(np.searchsorted(np.cumsum(self.config.passes), rng.random())) + 1, False

    def _pass(
        self, operands: _Operands, answer: str, attempt: int, rng: np.random.Generator
    ) -> list[_Piece]:
        """Return one pass as pieces of text, each with whether it is right."""
        a, b, c = operands
        product = self.misconceptions.product(a, b, attempt, rng)
        total = str(self.misconceptions.sum(product, c, attempt, rng))
        return [(str(product), product == a * b), (f"+{c}=", True), (total, total == answer)]


def build(
    config: LabConfig, cache_dir: Path | None = None, progress: Progress | None = None
) -> "tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]":
    """Return the lab's warm-started model (fp32, on the CPU, in eval mode) and its tokenizer.

    The weights are a function of `config` alone, bit for bit on one machine, and are kept as one
    safetensors file in `cache_dir`, by default `$SODFAST_CACHE` or `~/.cache/sodfast`. A damaged
    file is reported and built anew; where the directory cannot be used, that is reported and the
    model is built without it. `progress` is called with (phase, done, total).
    """
    key = _cache_key(config)
    name = f"lab-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    tokenizer = build_tokenizer()
    model = new_model(config)
    with ExitStack() as held:
        path = None
        with _reported():
            directory = cache_dir if cache_dir is not None else _default_cache_dir()
            if os.path.exists(directory / name) and _load(model, directory / name, key):
                return model.eval(), tokenizer
            # The trials of a sweep start together, and one warm start is enough for all.
            waited = held.enter_context(alone(directory))
            if waited and os.path.exists(directory / name) and _load(model, directory / name, key):
                return model.eval(), tokenizer
            path = directory / name
        _warm_start(model, config, progress)
        with _reported():
            if path is not None:
                _save(model, path, key)
    return model.eval(), tokenizer


@contextmanager
def _reported() -> Iterator[None]:
    """The cache saves time and nothing else: what goes wrong with it is one line."""
    try:
        yield
    except OSError as error:
        _log.warning("the lab's model is not cached (%s): set SODFAST_CACHE to a folder", error)


def _warm_start(model: "Qwen3ForCausalLM", config: LabConfig, progress: Progress | None) -> None:
    import torch

    data = WarmStartData(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.01
    )
    model.train()
    with _threads(_WARM_START_THREADS):
        for index in range(config.batches):
            warmup = min(1.0, (index + 1) / config.warmup_batches)
            cosine = 0.5 * (1 + math.cos(math.pi * index / config.batches))
            optimizer.param_groups[0]["lr"] = config.lr * warmup * (0.02 + 0.98 * cosine)
            loss = _packed_loss(model, data.batch(index))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if progress is not None:
                progress("warm start", index + 1, config.batches)


def _packed_loss(model: "Qwen3ForCausalLM", rows: Sequence[Sequence[Example]]) -> "torch.Tensor":
    """Return the mean cross-entropy over the labelled tokens of packed rows."""
    import torch

    # Every batch has one shape, since on a CPU preparing a new shape costs more than computing.
    ids_BT = torch.full((len(rows), _ROW_TOKENS), VOCABULARY[PAD])
    labels_BT = torch.full((len(rows), _ROW_TOKENS), _IGNORED_LABEL)
    positions_BT = torch.zeros((len(rows), _ROW_TOKENS), dtype=torch.int64)
    for row, examples in enumerate(rows):
        start = 0
        for example in examples:
            end = start + len(example.ids)
            ids_BT[row, start:end] = torch.tensor(example.ids)
            labels_BT[row, start:end] = torch.tensor(example.labels)
            positions_BT[row, start:end] = torch.arange(end - start)
            start = end
        positions_BT[row, start:] = torch.arange(_ROW_TOKENS - start)
    # Positions that restart keep the examples of a row apart; transformers separates them only
    # where it is given neither a mask nor a cache.
    logits_BTV = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1),
        labels_BT[:, 1:].flatten(),
        ignore_index=_IGNORED_LABEL,
    )


def _cache_key(config: LabConfig) -> str:
    import torch
    import transformers

    versions = {"code": CODE_VERSION, "torch": torch.__version__, "numpy": np.__version__}
    versions["transformers"] = transformers.__version__
    values = config.model_dump(mode="json")
    if not config.stubborn:  # labs that were kept before there was this key are found again
        del values["stubborn"]
    return json.dumps({"config": values, "versions": versions})


def _default_cache_dir() -> Path:
    chosen = os.environ.get("SODFAST_CACHE") or os.path.expanduser("~/.cache/sodfast")
    if chosen.startswith("~"):  # as it is where nobody knows a home directory
        raise FileNotFoundError("there is no home directory")
    return Path(chosen)


def _digest(tensors: "dict[str, torch.Tensor]") -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _save(model: "Qwen3ForCausalLM", path: Path, key: str) -> None:
    from safetensors.torch import save

    # named_parameters lists the tied embedding once.
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    replace_bytes(path, save(tensors, metadata={"key": key, "sha256": _digest(tensors)}))


def _load(model: "Qwen3ForCausalLM", path: Path, key: str) -> bool:
    """Copy the cached weights into `model`; False, with a line that says why, if damaged."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        _log.warning("%s cannot be read (%s): building the lab anew", path, error)
        return False
    parameters = dict(model.named_parameters())
    if (
        metadata.get("key") != key
        or tensors.keys() != parameters.keys()
        or metadata.get("sha256") != _digest(tensors)
    ):
        _log.warning("%s is damaged: building the lab anew", path)
        return False
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return True


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Fix torch's thread count: sums are split by thread, and so rounding depends on it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _operands(prompt: str) -> _Operands:
    a, b, c = re.findall("[0-9]+", prompt)
    return int(a), int(b), int(c)
