#!/usr/bin/env python3
"""Stage 03: fine-tune the compressed model with LoRA that is trained through mask and rounding.

Reads stage 02's model and masters and the conversations; writes runs/NAME/03_finetune/model (same
compressed format, the adapter in its codes), the adapter beside it, checkpoints, metrics.jsonl and
loss.png. Axolotl is the trainer, in a process of its own. Interrupted, the same command goes on
from the last whole checkpoint. See sparselong/finetune/trainer.py.
"""

import sys

from sparselong.memory import plan_stage, show_plan
from sparselong.run import Stage, run_stage


def execute(stage: Stage) -> None:
    """Imports torch only once the command line and the config are known to be right."""
    from sparselong.finetune.trainer import finetune

    finetune(stage)


def main(argv: list[str] | None = None) -> int:
    return run_stage(
        "03_finetune",
        "Fine-tune the compressed model, masks and rounding included.",
        argv,
        execute,
        plan_stage,
        show_plan,
    )


if __name__ == "__main__":
    sys.exit(main())
