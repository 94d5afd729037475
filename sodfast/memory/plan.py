"""What a run takes of a GPU's memory, phase by phase, before it starts: `sodfast plan`.

Needs the configuration and the contents of the model's config.json; no weights, GPU or network.
Every prompt and answer is taken as long as it may be, and so is every prompt of the teacher
(estimate.py). Only the cache need not hold all rollouts at once: with less of it the engine decodes
fewer at a time.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sodfast.config import Config, override
from sodfast.memory.estimate import GIB, Estimate

# To which the largest micro-batch is rounded down.
MICRO_BATCH_STEP = 1024

Overrides = dict[str, str | int]  # key → value


def largest_micro_batch(config: Config) -> int | None:
    """The most `optimizer.micro_batch_tokens` with which a run that fits still fits, rounded down
    to MICRO_BATCH_STEP; None where a whole step fits into one micro-batch.

    Measuring every size would take minutes. Once a micro-batch is longer than any sequence, each
    phase's peak is a convex function of its tokens, so the line through two measured sizes lies
    above the peak between them and below it beyond them: where it meets the budget between a size
    that fits and one that does not, a run fits.
    """
    config = _at_least(config)

    @cache
    def estimate(tokens: int) -> Estimate:
        return Estimate(override(config, [f"optimizer.micro_batch_tokens={tokens}"]))

    def meeting(low: int, high: int) -> int | None:
        """Where the first of the phases' lines meets the budget; None: no peak grows."""
        here, there = estimate(low), estimate(high)
        steps = [
            (high - low) * (here.budget - here.peaks[phase]) // (there.peaks[phase] - peak)
            for phase, peak in here.peaks.items()
            if there.peaks[phase] > peak
        ]
        return low + min(steps) if steps else None

    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    low = max(config.optimizer.micro_batch_tokens, longest)
    high = 2 * low
    found = meeting(low, high)
    if estimate(high).fits and found is not None and not estimate(found).fits:
        found = meeting(high, found)
    return found and found // MICRO_BATCH_STEP * MICRO_BATCH_STEP


def changes(config: Config) -> list[str]:
    """Overrides with which a run fits that does not, checked by planning it: the first single
    change that is enough, or else the fewest of the known changes; none where they do not help."""
    config = _at_least(config)

    def fits(taken: Sequence[Overrides]) -> bool:
        return Estimate(override(config, _texts(taken))).fits

    known = list(_changes(config))
    singles, firsts = [[change] for change in known], [known[:n] for n in range(2, len(known) + 1)]
    taken = next(filter(fits, [*singles, *firsts]), [])
    for change in taken[:-1]:  # without the last one it does not fit
        fewer = [other for other in taken if other is not change]
        taken = fewer if fits(fewer) else taken
    return _texts(taken)


def _changes(config: Config) -> Iterator[Overrides]:
    """What takes less memory than `config`, the least costly first."""
    rollout, optimizer, teacher = config.rollout, config.optimizer, config.teacher
    if rollout.cache_gib is not None:
        yield {"rollout.cache_gib": "null"}
    if config.model.kept_layers:
        yield {"model.kept_layers": 0}
    if config.scoring_tokens > optimizer.micro_batch_tokens:
        yield {"teacher.micro_batch_tokens": "null"}
    if config.model.dtype != "bfloat16":
        yield {"model.dtype": "bfloat16", "optimizer.adamw": "auto"}
    elif optimizer.adamw not in ("auto", "8bit"):
        yield {"optimizer.adamw": "8bit"}
    if teacher.storage != "host" and config.model.lora is None:
        yield {"teacher.storage": "host"}
    if not config.model.gradient_checkpointing:
        yield {"model.gradient_checkpointing": "true"}
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    if optimizer.micro_batch_tokens > longest:
        yield {"optimizer.micro_batch_tokens": longest}
    for share in (2, 4, 8):
        yield {
            "rollout.max_new_tokens": -(-rollout.max_new_tokens // share),
            "teacher.max_prompt_tokens": -(-teacher.max_prompt_tokens // share),
            "optimizer.micro_batch_tokens": -(-optimizer.micro_batch_tokens // share),
        }


def _at_least(config: Config) -> Config:
    """Without what model.kept_layers=auto would take of the room that something else needs."""
    auto = config.model.kept_layers == "auto"
    return override(config, ["model.kept_layers=0"]) if auto else config


def _texts(taken: Sequence[Overrides]) -> list[str]:
    """All overrides as a command takes them, a key's last one only."""
    last = {key: value for change in taken for key, value in change.items()}
    return [f"{key}={value}" for key, value in last.items()]


def report(config: Config) -> dict[str, Any]:
    """Estimate a run, print it for a person, and return it for a program."""
    result = Estimate(config)
    largest = largest_micro_batch(config) if result.fits else None
    advice = [] if result.fits else changes(config)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(_table(result))
    for line in _text(config, result, largest, advice):
        console.print(line, soft_wrap=True)
    return {
        "fits": result.fits,
        "budget_bytes": result.budget,
        "phases": result.phases,
        "peak_bytes": result.peaks,
        "host_bytes": result.host,
        "parameters": result.parameters,
        "decoded_at_once": {
            "rollout": result.at_once(False),
            **({"evaluate": result.at_once(True)} if config.eval.every else {}),
        },
        "largest_cache_bytes": result.cache_bytes,
        "largest_cache_tokens": result.cache_bytes // result.token_bytes,
        "largest_micro_batch_tokens": largest,
        "kept_layers": result.kept_layers,
        "changes": advice,
    }


def _text(
    config: Config, result: Estimate, largest: int | None, advice: list[str]
) -> Iterator[str]:
    rollout = config.rollout
    yield (
        f"{result.parameters:,} parameters. Assumed: "
        f"{rollout.prompts_per_step * rollout.samples_per_prompt} answers of "
        f"{rollout.max_new_tokens:,} tokens to prompts of {rollout.max_prompt_tokens:,}, the "
        f"teacher's prompts {config.teacher.max_prompt_tokens:,}."
    )
    cache_tokens = result.cache_bytes // result.token_bytes
    yield (
        f"Cache of keys and values: at most {result.cache_bytes / GIB:.2f} GiB in a rollout, "
        f"{cache_tokens:,} tokens."
    )
    evaluated = f", {result.at_once(True)} in an evaluation" if config.eval.every else ""
    yield f"Decoded at once, at the start: {result.at_once(False)} sequences{evaluated}."
    if result.fits:
        most = "of any size" if largest is None else f"of at most {largest:,} tokens"
        yield f"Micro-batches: {most} (optimizer.micro_batch_tokens)."
    if config.model.gradient_checkpointing:
        yield (
            f"Layers that keep their activations: {result.kept_layers} of {len(result.layers)} "
            "(model.kept_layers)."
        )
    if result.host:
        parts = [f"{item} {count / GIB:.2f} GiB" for item, count in result.host.items()]
        yield f"Host memory: {', '.join(parts)}."
    phase, peak = max(result.peaks.items(), key=lambda item: item[1])
    verdict = "fits" if result.fits else "does not fit"
    yield f"Peak {peak / GIB:.2f} GiB in {phase} of {result.budget / GIB:.2f}: {verdict}."
    if result.refused is not None:
        yield f"It would not start: {result.refused}."
    if advice:
        yield f"Fits with: {' '.join(advice)}"
    elif not result.fits:
        yield "No change known here makes it fit: choose a smaller model or raise memory_gib."


def _table(result: Estimate) -> Table:
    table = Table(box=SIMPLE, show_footer=True)
    table.add_column("GiB", "peak")
    for phase, peak in result.peaks.items():
        table.add_column(phase, f"{peak / GIB:.2f}", justify="right")
    items = dict.fromkeys(item for phase in result.phases.values() for item in phase)
    for item in items:
        cells = [phase.get(item, 0) for phase in result.phases.values()]
        table.add_row(
            item.replace("_", " "), *(f"{count / GIB:.2f}" if count else "" for count in cells)
        )
    return table
