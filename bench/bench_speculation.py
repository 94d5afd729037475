"""Drafts that are checked (rollout.speculate): passes, tokens and seconds with and without them.

    python bench/bench_speculation.py [--steps 50] [--rounds 3] [--out FILE]

On a CPU, in the threads of the lab; `off` and `auto` in turn, answers compared bit for bit:
* training: one run of the lab; at every step its rollout is drawn both ways from the live student;
* evaluation: at the last steps of that run, ten apart, so that drafts are the answers of ten steps
  before; rounds of both ways from the same memory of earlier answers; and the spread of the
  difference of two of them, by keys, where both have the same draws and where they have others;
* copies: long answers of a network that continues a cycle of tokens with a known probability and
  otherwise jumps anywhere on it, a few rows: the tail of a rollout;
* cost: passes of so many rows and tokens beside the sum of three parts that is fitted to them.

Seconds are this process's own (user and system) where a neighbour may take the core. The last line
is JSON, written to FILE as well; exit code 1: a target is missed. On a GPU the cases are those of
suite_8b_speculation.py, run by bench_8b.py.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any

import torch
from bench_rollout import Shape, build, target
from torch import Tensor

from sodfast.api import Trainer
from sodfast.config import load_config
from sodfast.model.language_model import LanguageModel, to_ids
from sodfast.rewards import grade_answers
from sodfast.rng import PromptOrder, Stream, draw_key
from sodfast.rollout import batch
from sodfast.rollout.engine import Sample, SampleKey, Sampling
from sodfast.rollout.native import NativeEngine
from sodfast.rollout.speculation import Answers, Cost, Setting
from sodfast.run.environment import environment

TOKENS_PER_PASS = 3.0  # of an evaluation ten steps after the last, at least
EVALUATION_SHARE, TRAINING_SHARE, PASSES_SHARE = 0.7, 1.05, 0.5  # of `off`, at most
COST_ERROR = 0.2
KEYS = 8  # of draws, for the spread of the difference of two evaluations
COPIES = Shape(128, 384, 3, 4, 4, 32, 96, 2048)
CYCLE, HOLDS = 64, 0.95  # tokens of the cycle; the probability of each to be followed by the next


def equal(left: Sequence[Sample], right: Sequence[Sample]) -> bool:
    return all(
        a.response.equal(b.response) and a.logprob.equal(b.logprob) and a.entropy.equal(b.entropy)
        for a, b in zip(left, right, strict=True)
    )


# ---------------------------------------------------------------- the lab


class Lab:
    """A run of the lab, and an engine of each way beside its own."""

    def __init__(self, steps: int, folder: str) -> None:
        values = {"eval.every": 0, "checkpoint.every": 0, "log.samples_every": 0}
        self.config = load_config("lab", out=folder, steps=steps, **values)
        self.run = Trainer.build(self.config)
        self.trainer = self.run.algorithm
        self.ways: dict[str, NativeEngine] = {
            name: NativeEngine(self.trainer.model, self.config.rollout.batch_size, None, setting)
            for name, setting in (("off", False), ("auto", "auto"))
        }

    def prompts(self, questions: Sequence[Any], count: int) -> list[Tensor]:
        encoded = [to_ids(self.trainer.model.encode_question(question)) for question in questions]
        return [prompt for prompt in encoded for _ in range(count)]

    def draw(self, way: str, prompts: list[Tensor], sampling: Sampling, key: SampleKey) -> Any:
        """Seconds of this process, and the answers."""
        start = time.process_time()
        answers = self.ways[way].generate(prompts, range(len(prompts)), sampling, key)
        return time.process_time() - start, answers

    def training(self, step: int) -> dict[str, Any]:
        """The rollout of a step, both ways."""
        rollout = self.config.rollout
        train, count = self.trainer.data.train, rollout.prompts_per_step
        order = PromptOrder(self.config.seed, len(train)).take((step - 1) * count, count)
        questions = [train[index] for index in order]
        prompts = self.prompts(questions, rollout.samples_per_prompt)
        sampling = Sampling.of(self.config, rollout)
        key = SampleKey(draw_key(self.config.seed, Stream.ROLLOUT), step)
        found = {
            way: self.draw(way, prompts, sampling, key)
            for way in (("off", "auto") if step % 2 else ("auto", "off"))
        }
        return {
            **{way: seconds for way, (seconds, _) in found.items()},
            "tokens_per_pass": self.ways["auto"].tokens_per_pass,
            "equal": equal(found["off"][1], found["auto"][1]),
        }

    def evaluation(self, rounds: int) -> dict[str, Any]:
        """An evaluation, both ways in turn; each round has the same earlier answers."""
        prompts = self.prompts(self.trainer.data.test, self.config.eval.samples)
        sampling = Sampling.of(self.config, self.config.eval)
        key = SampleKey(draw_key(self.config.seed, Stream.EVAL), 0)
        earlier = {way: dict(engine.answers.last) for way, engine in self.ways.items()}
        taken, answers = defaultdict(list), {}
        for number in range(rounds):
            for way in ("off", "auto") if number % 2 else ("auto", "off"):
                self.ways[way].answers = Answers()
                self.ways[way].answers.last |= earlier[way]
                seconds, answers[way] = self.draw(way, prompts, sampling, key)
                taken[way].append(seconds)
        return {
            **{way: median(seconds) for way, seconds in taken.items()},
            "least": {way: min(seconds) for way, seconds in taken.items()},
            "samples": len(prompts),
            "tokens": sum(len(answer.response) for answer in answers["off"]),
            "tokens_per_pass": self.ways["auto"].tokens_per_pass,
            "equal": equal(answers["off"], answers["auto"]),
        }

    def means(self, keys: Iterable[int]) -> list[float]:
        """mean@k of the student by the key of the draws."""
        config, questions = self.config, self.trainer.data.test
        prompts = self.prompts(questions, config.eval.samples)
        asked = [question for question in questions for _ in range(config.eval.samples)]
        found = []
        for key in keys:
            sampling = Sampling.of(config, config.eval)
            _, answers = self.draw("auto", prompts, sampling, SampleKey(key, 0))
            texts = [self.trainer.model.decode(answer.response) for answer in answers]
            grades = grade_answers(config, self.trainer.task, asked, texts)
            found.append(fmean(grade.reward for grade in grades))
        return found


def spread(before: list[float], after: list[float]) -> dict[str, Any]:
    """Of the difference of two evaluations, the first of which has as many keys as the second, and
    half of these are its own: the variance with the same draws and with others."""
    count = len(before) // 2
    same = [b - a for a, b in zip(before[:count], after[:count], strict=True)]
    other = [b - a for a, b in zip(before[:count], after[count:], strict=True)]
    return {
        "keys": count,
        "common_draws": {"mean": fmean(same), "variance": variance(same)},
        "fresh_draws": {"mean": fmean(other), "variance": variance(other)},
        "variance_of_one_evaluation": (variance(before) + variance(after)) / 2,
    }


def lab(steps: int, rounds: int) -> dict[str, Any]:
    evaluated = range(steps - 20, steps + 1, 10)
    training, evaluations, means = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(steps, f"{folder}/run")
        gc.freeze()  # a look at all that was imported would hit one way or the other by chance
        with lab.run:
            for step in range(1, steps + 1):
                training.append(lab.training(step))
                lab.run.step()
                if step in evaluated:
                    evaluations[step] = lab.evaluation(1 if step == evaluated[0] else rounds)
                    earlier = lab.ways["auto"].answers
                    lab.ways["auto"].answers = Answers()
                    means[step] = lab.means(range(2 * KEYS) if step != evaluated[0] else ())
                    lab.ways["auto"].answers = earlier
    first, *later = evaluations.values()
    sums = {way: sum(line[way] for line in training) for way in ("off", "auto")}
    return {
        "training": {
            **sums,
            "share": sums["auto"] / sums["off"],
            "share_of_step": [round(line["auto"] / line["off"], 3) for line in training],
            "steps": steps,
            "tokens_per_pass": [round(line["tokens_per_pass"], 3) for line in training],
        },
        "evaluations": evaluations,
        "difference": spread(*(means[step] for step in evaluated[1:])),
        "evaluation_share": sum(e["auto"] for e in later) / sum(e["off"] for e in later),
        "evaluation_tokens_per_pass": min(e["tokens_per_pass"] for e in later),
        "equal": all(line["equal"] for line in [*training, first, *later]),
    }


# ---------------------------------------------------------------- known copies


@torch.no_grad()
def cyclic(model: LanguageModel, cycle: int, holds: float) -> LanguageModel:
    """`model` with other weights and no end: each of the first `cycle` tokens is followed by the
    next one with probability `holds`, otherwise by any other of them; no other token is drawn.

    Attention and MLP add nothing and cost what they cost. A token's embedding is a direction of its
    own beside one that all share; the head answers to the shared one by a great logit for all of
    the cycle, and to a token's own by the gap that its successor has over them.
    """
    network = model.network
    for layer in network.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    embedding, head = network.model.embed_tokens.weight, network.lm_head.weight
    hidden = embedding.shape[1]
    basis = torch.linalg.qr(torch.randn(hidden, cycle + 1, device=embedding.device)).Q.t()
    gap = torch.tensor(holds * (cycle - 1) / (1 - holds)).log()
    scale = (hidden / 2) ** 0.5  # the final norm makes √(H/2) of each of the two directions
    embedding.zero_()
    head.zero_()
    embedding[:cycle] = (basis[:cycle] + basis[cycle]).to(embedding.dtype)
    head[:cycle] = ((basis[:cycle].roll(1, 0) * gap + basis[cycle] * 40) / scale).to(head.dtype)
    network.model.norm.weight.fill_(1)
    return LanguageModel(network, None, (), model.pad_id)


def copies(rows: int, length: int) -> dict[str, Any]:
    """A few long answers: passes and seconds by how many drafts there are."""
    model = cyclic(build(COPIES, torch.device("cpu"), torch.float32, 0.02), CYCLE, HOLDS)
    prompts = [torch.arange(row, row + 8) % CYCLE for row in range(rows)]
    sampling, key = Sampling(1.0, 1.0, length), SampleKey(1, 1)
    found: dict[str, Any] = {}
    plain: list[Sample] = []
    settings: list[Setting] = [False, 3, 7, 15, "auto"]
    for setting in settings:
        engine = NativeEngine(model, rows, None, setting)
        start = time.process_time()
        answers = engine.generate(prompts, range(rows), sampling, key)
        seconds, plain = time.process_time() - start, plain or answers
        pace = engine.pace
        found["off" if setting is False else str(setting)] = {
            "seconds": seconds,
            "row_passes": pace.passes,
            "tokens_per_pass": pace.tokens_per_pass,
            "equal": equal(plain, answers),
        }
    for row in found.values():
        row["passes_share"] = row["row_passes"] / found["off"]["row_passes"]
        row["seconds_share"] = row["seconds"] / found["off"]["seconds"]
    return {"rows": rows, "length": length, "holds": HOLDS, "cycle": CYCLE, "ways": found}


# ---------------------------------------------------------------- what a pass costs


def cost(length: int) -> dict[str, Any]:
    """Median seconds of passes by their rows and tokens of a row, and the fit."""
    model = cyclic(build(COPIES, torch.device("cpu"), torch.float32, 0.02), CYCLE, HOLDS)
    seen: list[tuple[int, int, float]] = []
    observe: Callable[..., None] = Cost.observe

    def noting(self: Cost, rows: int, tokens: int, seconds: float) -> None:
        seen.append((rows, tokens, seconds))
        observe(self, rows, tokens, seconds)

    Cost.observe = noting  # type: ignore[method-assign]
    batch.perf_counter = time.process_time  # type: ignore[assignment]
    settings: list[Setting] = [1, 3, 7]
    try:
        for setting in settings:
            for rows in (16, 48, 128):
                prompts = [torch.arange(row, row + 8) % CYCLE for row in range(rows)]
                engine = NativeEngine(model, rows, None, setting)
                for step in (1, 1):  # the second has the answers of the first to copy
                    sampling = Sampling(1.0, 1.0, length)
                    engine.generate(prompts, range(rows), sampling, SampleKey(1, step))
    finally:
        Cost.observe = observe  # type: ignore[method-assign]
        batch.perf_counter = time.perf_counter
    fitted, cells = Cost("cpu"), defaultdict(list)
    for rows, tokens, seconds in sorted(seen, key=lambda one: hash(one[2])):  # in no order
        fitted.observe(rows, tokens, seconds)
        cells[rows, 64 * round(tokens / 64)].append((tokens, seconds))
    table = []
    for (rows, _), passes in sorted(cells.items()):
        if len(passes) >= 5:
            tokens = median(count for count, _ in passes)
            seconds = median(taken for _, taken in passes)
            off = fitted(rows, tokens) / seconds - 1
            table.append(
                {"rows": rows, "tokens": tokens, "passes": len(passes),
                 "milliseconds": 1e3 * seconds, "error": off}
            )  # fmt: skip
    return {
        "milliseconds": dict(zip(("pass", "row", "token"), 1e3 * fitted.weights, strict=True)),
        "cells": table,
        "mean_error": sum(cell["passes"] * abs(cell["error"]) for cell in table)
        / sum(cell["passes"] for cell in table),
        "worst_error": max(abs(cell["error"]) for cell in table),
    }


def measure(steps: int, rounds: int, length: int = 1000) -> dict[str, Any]:
    torch.set_num_threads(load_config("lab").threads or 1)
    found = {"lab": lab(steps, rounds), "copies": copies(8, length), "cost": cost(length // 10)}
    ways, ran = found["copies"]["ways"], found["lab"]
    targets = [
        target("evaluation: tokens a row and pass", ran["evaluation_tokens_per_pass"],
               TOKENS_PER_PASS),
        target("evaluation: auto over off", ran["evaluation_share"], EVALUATION_SHARE, True),
        target("training: auto over off", ran["training"]["share"], TRAINING_SHARE, True),
        target("copies: passes of auto over off", ways["auto"]["passes_share"], PASSES_SHARE, True),
        target("cost: error of the fit, mean of the passes", found["cost"]["mean_error"],
               COST_ERROR, True),
        target("cost: error of the fit, worst cell", found["cost"]["worst_error"], COST_ERROR,
               True),
        target("answers equal bit for bit",
               float(ran["equal"] and all(way["equal"] for way in ways.values())), 1.0),
    ]  # fmt: skip
    return {
        **found,
        "rounds": rounds,
        "targets": targets,
        "environment": environment(torch.get_num_threads(), "cpu"),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    found = measure(options.steps, options.rounds)
    command = f"python bench/bench_speculation.py --steps {options.steps} --rounds {options.rounds}"
    text = json.dumps({"command": command, **found}, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(json.dumps(found))
    return 0 if all(row["met"] for row in found["targets"]) else 1


if __name__ == "__main__":
    sys.exit(main())
