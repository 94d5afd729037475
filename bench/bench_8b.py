"""Qwen3-8B on one 80 GB GPU: full steps of the preset, against the plan and the hardware.

    python bench/bench_8b.py PART ... [--out FOLDER] [--budget-minutes M]

    8b_steps      three steps of the preset: seconds and bytes of each phase, model FLOP utilisation
    8b_teacher    scoring streamed from the host and resident: the share of the transfer that hides
    8b_objective  loss, entropy and gradients of the fused objective beside its definition
    8b_speculation  the rollout of a step with and without drafts of the next tokens
    8b_trl        the largest Qwen3 with which TRL's SDPO trainer ends two steps

The weights are random (model.random), since the architecture is what is measured; nothing is loaded
and no checkpoint is written. The allocator is capped at 78 GiB whatever the card has. Each part
takes at most 8 minutes. Options, exit codes, the JSON after each case and going on after an end are
those of gpu_suite.py; the table of targets is bench_8b.md. `--rehearse` runs a tiny shape on the
CPU.
"""

import os
import sys

import gpu_suite  # which also makes this checkout's packages importable

PARTS = {
    "8b_steps": "suite_8b_steps",
    "8b_teacher": "suite_8b_teacher",
    "8b_objective": "suite_8b_objective",
    "8b_speculation": "suite_8b_speculation",
    "8b_trl": "suite_8b_trl",
}


def main(arguments: list[str] | None = None) -> int:
    from sodfast.commands import allocator_settings

    # As in a run, before CUDA's allocator starts.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", allocator_settings())
    return gpu_suite.main(arguments, "bench_8b", __doc__, PARTS)


if __name__ == "__main__":
    sys.exit(main())
