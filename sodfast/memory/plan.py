"""What a run takes of a GPU's memory, phase by phase, before it starts: `sodfast plan`.

Needs the configuration and the contents of the model's config.json; no weights, GPU or network.
Every rollout is taken with a prompt and an answer at their caps and every teacher's prompt as long
as it may be (footprint.py). Only the cache need not hold all rollouts at once: the engine takes
fewer slots.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sodfast.config import Config, override
from sodfast.memory.estimate import GIB, Footprint, Items, Lengths

# To which the largest micro-batch is rounded down.
MICRO_BATCH_STEP = 1024


@dataclass(frozen=True)
class Plan:
    """Bytes on the device (phase → item → bytes; a phase's peak is their sum) and beside it.

    `cache_bytes`: what the rollout's cache could take at most, `cache_token_bytes` of it a token.
    `refused`: why the run would not start, whatever the sums say.
    """

    parameters: int
    budget: int
    phases: dict[str, Items]
    host: Items
    cache_bytes: int
    cache_token_bytes: int
    refused: str | None

    @property
    def peaks(self) -> Items:
        return {phase: sum(items.values()) for phase, items in self.phases.items()}

    @property
    def fits(self) -> bool:
        return self.refused is None and max(self.peaks.values()) <= self.budget


def plan(config: Config, rollouts: Sequence[Lengths] | None = None) -> Plan:
    """The plan of a run, and its errors, as `Footprint` says."""
    footprint = Footprint(config, rollouts)
    phases = footprint.phases()
    taken = sum(phases["rollout"].values()) - phases["rollout"]["kv_cache"]
    return Plan(
        footprint.parameters,
        footprint.budget,
        phases,
        footprint.host(),
        max(0, footprint.budget - taken),
        footprint.token_bytes,
        footprint.refused,
    )


def largest_micro_batch(config: Config) -> int | None:
    """The most `optimizer.micro_batch_tokens` with which a run that fits still fits, rounded down;
    None where a whole step fits into one micro-batch.

    The peaks are convex in the tokens of micro-batches that are longer than any sequence.
    """
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    now = max(config.optimizer.micro_batch_tokens, longest)

    def planned(tokens: int) -> Plan:
        return plan(override(config, [f"optimizer.micro_batch_tokens={tokens}"]))

    def through(low: int, high: int) -> int | None:
        """Where the line through the peaks of two numbers of tokens meets the budget."""
        here, there = planned(low), planned(high)
        steps = [
            (high - low) * (here.budget - here.peaks[phase]) // (there.peaks[phase] - peak)
            for phase, peak in here.peaks.items()
            if there.peaks[phase] > peak
        ]
        return low + min(steps) if steps else None

    low, high = now, 2 * now
    if planned(high).fits:  # then the line goes on beneath the peaks, and may lead too far
        beyond = through(low, high)
        if beyond is None or planned(beyond).fits:
            return beyond and beyond // MICRO_BATCH_STEP * MICRO_BATCH_STEP
        low, high = high, beyond
    between = through(low, high)  # where the line lies above the peaks
    assert between is not None
    return between // MICRO_BATCH_STEP * MICRO_BATCH_STEP


def changes(config: Config) -> list[str]:
    """Overrides with which a run fits that does not, checked by planning it: the first single
    change that is enough, or else the fewest of the known changes; none where they do not help."""
    known = list(_changes(config))
    for change in known:
        if _fits(config, [change]):
            return change
    for count in range(2, len(known) + 1):
        if _fits(config, known[:count]):
            break
    else:
        return []
    taken = known[:count]
    for change in known[: count - 1]:
        fewer = [other for other in taken if other is not change]
        taken = fewer if _fits(config, fewer) else taken
    return _joined(taken)


def _changes(config: Config) -> Iterator[list[str]]:
    """What takes less memory than `config`, the least costly first."""
    rollout, optimizer, teacher = config.rollout, config.optimizer, config.teacher
    if rollout.cache_gib is not None:
        yield ["rollout.cache_gib=null"]
    if config.model.dtype != "bfloat16":
        yield ["model.dtype=bfloat16", "optimizer.adamw=auto"]
    elif optimizer.adamw not in ("auto", "8bit"):
        yield ["optimizer.adamw=8bit"]
    if teacher.storage != "host" and config.model.lora is None:
        yield ["teacher.storage=host"]
    if not config.model.gradient_checkpointing:
        yield ["model.gradient_checkpointing=true"]
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    if optimizer.micro_batch_tokens > longest:
        yield [f"optimizer.micro_batch_tokens={longest}"]
    for share in (2, 4, 8):
        yield [
            f"rollout.max_new_tokens={-(-rollout.max_new_tokens // share)}",
            f"teacher.max_prompt_tokens={-(-teacher.max_prompt_tokens // share)}",
            f"optimizer.micro_batch_tokens={-(-optimizer.micro_batch_tokens // share)}",
        ]


def _fits(config: Config, taken: Sequence[list[str]]) -> bool:
    return plan(override(config, _joined(taken))).fits


def _joined(taken: Sequence[list[str]]) -> list[str]:
    """All overrides, a key's last one only."""
    last = {text.partition("=")[0]: text for change in taken for text in change}
    return list(last.values())


def report(config: Config) -> dict[str, Any]:
    """Plan a run, print it for a person, and return it for a program."""
    result = plan(config)
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
        "largest_cache_bytes": result.cache_bytes,
        "largest_cache_tokens": result.cache_bytes // result.cache_token_bytes,
        "largest_micro_batch_tokens": largest,
        "changes": advice,
    }


def _text(config: Config, result: Plan, largest: int | None, advice: list[str]) -> Iterator[str]:
    rollout = config.rollout
    yield (
        f"{result.parameters:,} parameters. Assumed: "
        f"{rollout.prompts_per_step * rollout.samples_per_prompt} answers of "
        f"{rollout.max_new_tokens:,} tokens to prompts of {rollout.max_prompt_tokens:,}, the "
        f"teacher's prompts {config.teacher.max_prompt_tokens:,}."
    )
    cache_tokens = result.cache_bytes // result.cache_token_bytes
    yield (
        f"Cache of keys and values: at most {result.cache_bytes / GIB:.2f} GiB in a rollout, "
        f"{cache_tokens:,} tokens."
    )
    if result.fits:
        most = "of any size" if largest is None else f"of at most {largest:,} tokens"
        yield f"Micro-batches: {most} (optimizer.micro_batch_tokens)."
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


def _table(result: Plan) -> Table:
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
