#!/usr/bin/env python3
"""Stage 04: measure how compression and fine-tuning changed the model.

The base, compressed and fine-tuned models answer the same multiple-choice items through lm-eval,
and their perplexity is measured on the same held-out conversations. Reads the models of stages 02
and 03; writes results.json, report.md and evaluation.png to runs/NAME/04_eval.

`--compare RUN|PATH ...` also measures models of other runs, or other checkpoints. What a finished
stage has measured is measured again only if it has changed since.

On several GPUs, one process each (`sequence_parallel_degree`, or those in which torchrun started
this script) measures some rows of every batch. A model that does not fit on one GPU is shared: each
process holds some of its experts and of its vocabulary. The figures are those of one process.
"""

import os
import sys

from sparselong.config import Config
from sparselong.data import check_tasks
from sparselong.evaluate import find_compared
from sparselong.memory import check_model, plan_stage, show_plan
from sparselong.processes import check_launcher, hide_launcher, is_joined
from sparselong.report import write_page
from sparselong.run import Stage, run_stage

NAME = "04_eval"


def execute(stage: Stage) -> None:
    """Evaluate; torch is imported only after the command line and the config are validated."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; ours is shown instead
    from sparselong.evaluate import check_models

    check_models(stage)
    stage.log("importing torch, transformers and lm-eval")
    from sparselong.evaluate import evaluate

    evaluate(stage)


def check(config: Config) -> dict[str, str]:
    """Return a fingerprint of each model to compare with, by name.

    Raises:
        ConfigError: the processes do not fit the config, or it names what is not there.
        StageError: a model to compare with is damaged, or not what its run recorded.
    """
    check_launcher(config)
    if not is_joined():
        hide_launcher()
    check_model(config)
    check_tasks(config)
    return {each.name: each.fingerprint for each in find_compared(config)}


def main(argv: list[str] | None = None) -> int:
    """Run the stage, or under torchrun this process's part of it; return the exit code."""
    if not is_joined():
        return run(argv)
    from sparselong.evaluate import rank_arguments
    from sparselong.processes import follow_or_lead

    return follow_or_lead(NAME, argv, run, rank_arguments, check_launcher)


def run(argv: list[str] | None) -> int:
    """Run the stage in this process; return the exit code."""
    text = "Compare the base, compressed and fine-tuned models."
    return run_stage(NAME, text, argv, execute, plan_stage, show_plan, check, page=write_page)


if __name__ == "__main__":
    sys.exit(main())
