#!/usr/bin/env python3
"""Stage 02: compress the base checkpoint (4-bit experts as they are, 2:4 + int4 dense layers).

Reads the base model and the training data (for calibration); writes
runs/NAME/02_compress/model (opens with transformers after `import sparselong`) and the dense
masters that stage 03 trains from. See sparselong/compress/stream.py.
"""

import sys

from sparselong.memory import plan_stage, show_plan
from sparselong.run import Stage, run_stage


def execute(stage: Stage) -> None:
    """Import torch only once the command line and the config are known to be right."""
    from sparselong.compress import compress

    compress(stage)


def main(argv: list[str] | None = None) -> int:
    """Run the stage; return its exit code."""
    text = "Compress the base checkpoint, layer by layer."
    return run_stage("02_compress", text, argv, execute, plan_stage, show_plan)


if __name__ == "__main__":
    sys.exit(main())
