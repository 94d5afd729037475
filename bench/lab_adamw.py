"""Does 8-bit AdamW track torch's on the lab? `python bench/lab_adamw.py STATE SEED OUT [KEY=VALUE]`

The lab's default run with the optimizer replaced by `sodfast_kernels.AdamW` in the given state
("8bit", "fp32" or "exact"); compare with `sodfast train seed=SEED`, which uses torch.optim.AdamW.
Collect the run directories with bench/collect_runs.py.
"""

import sys
from typing import Any

import sodfast_kernels
from torch import nn

from sodfast import optimizer
from sodfast.config import OptimizerConfig, load_config
from sodfast.session import train_run


def main(state: str, seed: str, out: str, *overrides: str) -> None:
    def build(config: OptimizerConfig, network: nn.Module) -> Any:
        return sodfast_kernels.AdamW(
            network.parameters(),
            config.lr,
            config.betas,
            config.eps,
            config.weight_decay,
            state=state,
            seed=int(seed),
        )

    optimizer.build_optimizer = build
    train_run(load_config(None, [f"seed={seed}", f"out={out}", *overrides]), None)


if __name__ == "__main__":
    main(*sys.argv[1:])
