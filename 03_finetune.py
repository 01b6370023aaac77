#!/usr/bin/env python3
"""Stage 03: fine-tune the compressed model with LoRA trained through mask and rounding.

Reads stage 02's model and masters, and the conversations. Writes to runs/NAME/03_finetune: model
(same compressed format, adapter merged into the codes), adapter, checkpoints, metrics.jsonl and
loss.png. Axolotl trains in separate processes: `sequence_parallel_degree` of them, or those in
which torchrun started this script (sparselong/processes/launch.py). After an interruption, the same
command continues from the last whole checkpoint.

    python 03_finetune.py --preview N             print conversations as they would be trained on
    python 03_finetune.py --preview FILE:LINE     print one
"""

import sys
from pathlib import Path
from typing import Any

from sparselong.config import Config
from sparselong.data import check_tasks
from sparselong.memory import check_model, find_shape, plan_stage, show_plan
from sparselong.processes import find_world, hide_launcher, is_joined
from sparselong.report import write_page
from sparselong.run import Stage, run_stage

NAME = "03_finetune"


def execute(stage: Stage) -> None:
    """Fine-tune; torch is imported only after everything the config determines is validated."""
    from sparselong.finetune import check_compressed

    check_compressed(stage)
    from sparselong.finetune import finetune

    finetune(stage)


def check(config: Config) -> None:
    """Raise if the processes or the base model do not fit the config."""
    find_world(config)
    if not is_joined():
        hide_launcher()
    find_shape(config.model)
    check_model(config)
    check_tasks(config)


def preview(config: Config, run_dir: Path, place: str) -> dict[str, Any]:
    """Return what `--preview N` or `--preview FILE:LINE` prints."""
    from sparselong.finetune import preview_first, preview_line

    if place.isascii() and place.isdigit():
        return preview_first(config, run_dir, int(place[:9]))
    return preview_line(config, run_dir, place)


def main(argv: list[str] | None = None) -> int:
    """Run the stage, or under torchrun this process's part of it; return the exit code."""
    if not is_joined():
        return run(argv)
    from sparselong.finetune import trainer_arguments
    from sparselong.processes import follow_or_lead

    return follow_or_lead(NAME, argv, run, trainer_arguments, find_world)


def run(argv: list[str] | None) -> int:
    """Run the stage in this process; return the exit code."""
    text = "Fine-tune the compressed model, including masks and rounding."
    return run_stage(
        NAME, text, argv, execute, plan_stage, show_plan, check, preview=preview, page=write_page
    )


if __name__ == "__main__":
    sys.exit(main())
