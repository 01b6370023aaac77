#!/usr/bin/env python3
"""Stage 04: what compression and fine-tuning did to the model.

Base, compressed and fine-tuned model answer the same multiple-choice items through lm-eval and read
the same held-out conversations. Reads stage 02's and stage 03's models; leaves results.json,
report.md and evaluation.png in runs/NAME/04_eval.
"""

import os
import sys

from sparselong.memory import plan_stage, show_plan
from sparselong.run import Stage, run_stage


def execute(stage: Stage) -> None:
    """Import torch only once the command line and the config are known to be right."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    stage.log("importing torch, transformers and lm-eval")
    from sparselong.evaluate import evaluate

    evaluate(stage)


def main(argv: list[str] | None = None) -> int:
    """Run the stage; return its exit code."""
    text = "Compare base, compressed and fine-tuned model."
    return run_stage("04_eval", text, argv, execute, plan_stage, show_plan)


if __name__ == "__main__":
    sys.exit(main())
