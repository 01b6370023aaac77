"""Train one of several ranks: join the others, then run Axolotl as if it were alone.

    RANK=r WORLD_SIZE=n ... python -m sparselong.finetune.rank AXOLOTL_YAML

Ranks other than 0 leave no files: Axolotl's own output goes to a temporary directory, and its
loggers are off. See processes/world.py and processes/launch.py.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import yaml

from sparselong.finetune.training_run import RUN_KEY, TrainingRun
from sparselong.processes import end_at_once, tell_failures, write_failure
from sparselong.processes import world as ranks

_RUN = "axolotl.cli.main"


def main(path: Path) -> None:
    """Train by the YAML at `path`, as the rank given by the environment variables."""
    rank = int(os.environ["RANK"])
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    run = TrainingRun.open(Path(document[RUN_KEY]))
    tell_failures(run.work, rank)
    end_at_once()
    ranks.join(run.config.sequence_parallel_degree)
    with ExitStack() as stack:
        if rank > 0:
            own = stack.enter_context(tempfile.TemporaryDirectory(prefix="sparselong-rank-"))
            document |= {"output_dir": own, "use_tensorboard": False, "use_wandb": False}
            path = Path(own) / "axolotl.yaml"
            path.write_text(yaml.safe_dump(document), encoding="utf-8")
        stack.enter_context(ranks.watched(partial(write_failure, run.work, rank)))
        _train(path)


def _train(path: Path) -> None:
    command = importlib.import_module(_RUN).cli
    # Not standalone: click would print "Aborted!" in place of an EOFError, and no traceback.
    command(["train", str(path), "--launcher", "python"], standalone_mode=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
