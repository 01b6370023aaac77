#!/usr/bin/env python3
"""Stage 03: fine-tune the compressed model with LoRA that is trained through mask and rounding.

Reads stage 02's model and masters and the conversations; writes runs/NAME/03_finetune/model (same
compressed format, the adapter in its codes), the adapter beside it, checkpoints, metrics.jsonl and
loss.png. Axolotl is the trainer, in processes of its own: as many as `sequence_parallel_degree`
says, or those that torchrun has started this script in (sparselong/processes/launch.py).
Interrupted, the same command goes on from the last whole checkpoint.
"""

import sys

from sparselong.memory import plan_stage, show_plan
from sparselong.processes import joined_rank
from sparselong.run import Stage, run_stage

NAME = "03_finetune"


def execute(stage: Stage) -> None:
    """Imports torch only once the command line and the config are known to be right."""
    from sparselong.finetune import finetune

    finetune(stage)


def main(argv: list[str] | None = None) -> int:
    if joined_rank() is not None:
        from sparselong.processes import follow_or_lead

        return follow_or_lead(NAME, argv, run)
    return run(argv)


def run(argv: list[str] | None) -> int:
    text = "Fine-tune the compressed model, masks and rounding included."
    return run_stage(NAME, text, argv, execute, plan_stage, show_plan)


if __name__ == "__main__":
    sys.exit(main())
