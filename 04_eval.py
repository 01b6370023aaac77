#!/usr/bin/env python3
"""Stage 04: measure how compression and fine-tuning changed the model.

The base, compressed and fine-tuned models answer the same multiple-choice items through lm-eval,
and their perplexity is measured on the same held-out conversations. Reads the models of stages 02
and 03; writes results.json, report.md and evaluation.png to runs/NAME/04_eval.
"""

import os
import sys

from sparselong.config import Config
from sparselong.data import check_tasks
from sparselong.memory import check_model, plan_stage, show_plan
from sparselong.processes import check_alone
from sparselong.run import Stage, run_stage


def execute(stage: Stage) -> None:
    """Evaluate; torch is imported only after the command line and the config are validated."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    from sparselong.evaluate import check_models

    check_models(stage)
    stage.log("importing torch, transformers and lm-eval")
    from sparselong.evaluate import evaluate

    evaluate(stage)


def check(config: Config) -> None:
    """Raise if several processes were started, or the config names what is not there."""
    check_alone()
    check_model(config)
    check_tasks(config)


def main(argv: list[str] | None = None) -> int:
    """Run the stage; return its exit code."""
    text = "Compare the base, compressed and fine-tuned models."
    return run_stage("04_eval", text, argv, execute, plan_stage, show_plan, check=check)


if __name__ == "__main__":
    sys.exit(main())
