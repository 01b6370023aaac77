#!/usr/bin/env python3
"""Stage 02: compress the base checkpoint (experts stay in MXFP4, dense layers become 2:4 int4).

Reads the base model and the training data (for calibration). Writes runs/NAME/02_compress/model,
which transformers opens after `import sparselong`, and the dense masters for stage 03. See
sparselong/compress/stream.py.
"""

import sys

from sparselong.config import Config
from sparselong.data import check_tasks
from sparselong.memory import check_model, plan_stage, show_plan
from sparselong.processes import check_alone
from sparselong.report import write_page
from sparselong.run import Stage, run_stage


def execute(stage: Stage) -> None:
    """Compress; torch is imported only after everything known without it is validated."""
    from sparselong.data import conversations
    from sparselong.tiny import check_early

    if stage.forced:
        conversations.accept_new_sources(stage.run_dir)
    check_early(stage.config, stage.run_dir)
    from sparselong.compress import compress

    compress(stage)


def check(config: Config) -> None:
    """Raise if several processes were started, or the config names what is not there."""
    check_alone()
    check_model(config)
    check_tasks(config)


def main(argv: list[str] | None = None) -> int:
    """Run the stage; return its exit code."""
    text = "Compress the base checkpoint, layer by layer."
    return run_stage(
        "02_compress", text, argv, execute, plan_stage, show_plan, check, page=write_page
    )


if __name__ == "__main__":
    sys.exit(main())
