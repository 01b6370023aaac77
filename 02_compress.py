#!/usr/bin/env python3
"""Stage 02: compress the base checkpoint (experts stay in MXFP4, dense layers become 2:4 int4).

Reads the base model and the training data (for calibration). Writes runs/NAME/02_compress/model,
which transformers opens after `import sparselong`, and the dense masters for stage 03. See
sparselong/compress/layers.py.

`--layers A:B` compresses some of the layers; a later command continues. Several GPUs share the
calibration sequences if torchrun starts one process for each. The result is the same.
"""

import sys

from sparselong.config import Config
from sparselong.data import check_tasks
from sparselong.memory import check_layers, check_model, plan_stage, show_plan
from sparselong.processes import check_launcher, hide_launcher, is_joined
from sparselong.report import write_page
from sparselong.run import Stage, run_stage

NAME = "02_compress"


def execute(stage: Stage) -> None:
    """Compress; torch is imported only after everything known without it is validated."""
    from sparselong.data import conversations
    from sparselong.tiny import check_early

    check_layers(stage.config, stage.layers)
    if stage.forced:
        conversations.accept_new_sources(stage.run_dir)
    check_early(stage.config, stage.run_dir)
    from sparselong.compress import compress

    compress(stage)


def check(config: Config) -> None:
    """Raise if the processes do not fit the config, or it names what is not there."""
    check_launcher(config)
    if not is_joined():
        hide_launcher()
    check_model(config)
    check_tasks(config)


def main(argv: list[str] | None = None) -> int:
    """Run the stage, or under torchrun this process's part of it; return the exit code."""
    if not is_joined():
        return run(argv)
    from sparselong.compress import rank_arguments
    from sparselong.processes import follow_or_lead

    return follow_or_lead(NAME, argv, run, rank_arguments, check_launcher)


def run(argv: list[str] | None) -> int:
    """Run the stage in this process; return the exit code."""
    text = "Compress the base checkpoint, layer by layer."
    return run_stage(NAME, text, argv, execute, plan_stage, show_plan, check, page=write_page)


if __name__ == "__main__":
    sys.exit(main())
