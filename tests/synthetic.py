"""Run and study directories without training: invented metrics, real schedules and detectors.

The curves are made up, but every gate decision, refresh and collapse follows from them by the
code that a real run uses, so a directory is as consistent as a real one.
"""

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import yaml

from sodfast.collapse import CollapseDetector
from sodfast.config import Config, load_config
from sodfast.run.samples import Answer, Rollout, sample_file, to_text
from sodfast.schedule import StepStatistics, build_schedule
from sodfast.study.definition import load_study
from sodfast.study.directory import run_path
from sodfast.summary import summarize


def write_run(path: Path, config: Config, steps: int | None = None) -> None:
    """A run of `config`, cut off after `steps` (default: finished).

    A teacher that is copied every few steps drives lengths up until the run collapses.
    """
    stop = config.steps if steps is None else steps
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config.to_yaml())
    lines, events = simulate(config, stop)
    _write_lines(path / "metrics.jsonl", lines)
    _write_lines(path / "events.jsonl", events)
    if stop == config.steps:
        collapse = next((e["step"] for e in events if e["event"] == "collapse"), None)
        summary = summarize(lines, config.eval.samples) | {
            "status": "done" if collapse is None else "collapsed",
            "collapse_step": collapse,
            "seed": config.seed,
            "schedule": config.schedule.kind,
        }
        (path / "summary.json").write_text(json.dumps(summary))


def _write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def answer(step: int, text: list[str], evaluation: bool = False, **fields: Any) -> Answer:
    """A line of samples/: an answer of these tokens, ended by EOS, with a divergence of 0.05."""
    values: dict[str, Any] = {
        "step": step,
        "id": "question-0",
        "prompt": "1*2+3=",
        "response": "".join(text),
        "tokens": list(range(len(text))),
        "text": text,
        "reward": 1.0,
        "feedback": None,
        "length": len(text),
        "capped": False,
        "hint": None,
        "hint_source": None,
        "teacher_prompt": None,
        "advantage": None if evaluation else 0.25,
        "logprob": [-0.5] * len(text),
        "entropy": [0.25] * len(text),
    }
    if not evaluation:
        values["divergence"] = [0.05] * len(text)
    return (Answer if evaluation else Rollout)(**{**values, **fields})


def write_samples(path: Path, step: int, answers: list[Answer], evaluation: bool = False) -> Path:
    file = sample_file(path, step, evaluation)
    file.parent.mkdir(exist_ok=True)
    file.write_text(to_text(answers))
    return file


def simulate(config: Config, steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of metrics.jsonl and of events.jsonl."""
    label = config.schedule.model_dump_json().encode()
    rng = np.random.default_rng([config.seed, crc32(label)])
    schedule = build_schedule(config.schedule)
    k, cap = config.eval.samples, config.rollout.max_new_tokens
    detector = CollapseDetector(config.collapse, cap, k)
    moves = config.schedule.kind in ("fixed", "hard", "cgtr")
    hurry = max(0.0, 1 - getattr(config.schedule, "every", 50) / 5) * rng.uniform(0.8, 1.2)
    skill, pressure, drift, last_copy = 0.45, 0.0, 0.0, -100
    lines: list[dict[str, Any]] = [{"step": 0, **_evaluation(k, skill)}]
    events: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        skill += (0.85 - skill) * 0.012
        pressure += 0.018 * hurry * 100 / max(100, config.steps)
        score = float(np.clip(skill - pressure**4 * 0.6 + rng.normal(0, 0.01), 0, 1))
        mean = min(12 + 12 * step / config.steps + 90 * pressure**3, 0.97 * cap)
        mean = float(mean * rng.uniform(0.95, 1.05))
        longest = min(mean * float(rng.uniform(1.8, 3.6) + pressure), cap)
        drift = drift + 0.004
        recent = np.exp(-(step - last_copy) / 3)
        line: dict[str, Any] = {
            "step": step,
            "reward/mean": float(np.clip(score - 0.05 + rng.normal(0, 0.06), 0, 1)),
            "reward/success_group_fraction": float(np.clip(score + 0.15, 0, 1)),
            "length/mean": mean,
            "length/max": longest,
            "length/tail_ratio": longest / mean,
            "policy/entropy": float(0.24 + pressure**2 * 0.5 + rng.normal(0, 0.01)),
            "distill/divergence": float(0.05 * (1 + 0.4 * recent) * rng.uniform(0.8, 1.2)),
            "optim/lr": config.optimizer.lr,
            "teacher/drift": drift,
        }
        if step > 64:
            line["reward/snr"] = float(rng.normal(0.3, 0.1))
        decision = schedule.observe(StepStatistics(step, line["reward/mean"], mean, longest))
        if decision.gates is not None:
            copied = decision.action == "copy"
            events.append(
                {"step": step, "event": "gate", "gates": decision.gates, "refresh": copied}
            )
        line |= decision.metrics
        if moves:
            line |= {
                "teacher/age": decision.age,
                "teacher/refreshed": int(decision.action == "copy"),
            }
        if decision.action == "copy":
            events.append({"step": step, "event": "refresh", "shock": drift, "age": decision.age})
            drift, last_copy = 0.0, step
        if step % config.eval.every == 0 or step == config.steps:
            line |= _evaluation(k, score)
        reason = detector.observe(line)
        if reason is not None:
            events.append({"step": step, "event": "collapse", **reason})
        lines.append(line)
    return lines, events


def _evaluation(k: int, score: float) -> dict[str, float]:
    return {
        f"eval/mean@{k}": score,
        "eval/best@1": score,
        f"eval/best@{k}": min(1.0, score + 0.3),
        f"eval/maj@{k}": min(1.0, score + 0.1),
    }


def write_study(
    directory: Path, study: dict[str, Any], cut: dict[str, int | None] | None = None
) -> list[str]:
    """A study directory with a run for every trial; returns the trials' names.

    `cut`: trial name → steps that it has, None for a trial that never started.
    """
    directory.mkdir(parents=True)
    (directory / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    trials = load_study(directory / "study.yaml").trials
    for trial in trials:
        steps = (cut or {}).get(trial.name, trial.config.steps)
        if steps is not None:
            write_run(run_path(directory, trial.name), trial.config, steps)
    return [trial.name for trial in trials]


SCHEDULES: list[dict[str, Any]] = [
    {"kind": "fixed"},
    {"kind": "hard", "every": 1},
    {"kind": "hard", "every": 50},
    {"kind": "ema", "rate": 0.04},
    {"kind": "trust_region", "rate": 0.04},
    {"kind": "cgtr"},
]


def schedule_study(seeds: int = 5, steps: int = 300, **overrides: Any) -> dict[str, Any]:
    return {
        "base": "lab",
        "overrides": {"steps": steps, **overrides},
        "axes": {"schedule": SCHEDULES, "seed": list(range(seeds))},
    }


def lab_run(*overrides: str) -> Config:
    return load_config("lab", list(overrides))
