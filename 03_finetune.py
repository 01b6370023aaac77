#!/usr/bin/env python3
"""Stage 03: fine-tune the compressed model with LoRA that is trained through mask and rounding.

Reads stage 02's model and masters and the conversations; writes runs/NAME/03_finetune/model (same
compressed format, the adapter in its codes), the adapter beside it, checkpoints, metrics.jsonl and
loss.png. Axolotl is the trainer, in processes of its own: as many as `sequence_parallel_degree`
says, or those that torchrun has started this script in (sparselong/processes/launch.py).
Interrupted, the same command continues from the last whole checkpoint.
"""

import sys

from sparselong.memory import check_heads, find_shape, plan_stage, show_plan
from sparselong.processes import find_world, joined_rank
from sparselong.run import Stage, run_stage

NAME = "03_finetune"


def execute(stage: Stage) -> None:
    """Import torch only once everything that the config alone can tell is known to be right."""
    find_world(stage.config)
    check_heads(stage.config, find_shape(stage.config.model))
    from sparselong.finetune import finetune

    finetune(stage)


def main(argv: list[str] | None = None) -> int:
    """Run the stage, or this process's part of it under torchrun; return its exit code."""
    if joined_rank() is None:
        return run(argv)
    from sparselong.finetune import trainer_arguments
    from sparselong.processes import follow_or_lead

    return follow_or_lead(NAME, argv, run, trainer_arguments)


def run(argv: list[str] | None) -> int:
    """Run the stage in this process; return its exit code."""
    text = "Fine-tune the compressed model, masks and rounding included."
    return run_stage(NAME, text, argv, execute, plan_stage, show_plan)


if __name__ == "__main__":
    sys.exit(main())
