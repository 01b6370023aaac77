"""Train one of several ranks: join the others, then run Axolotl as if it were alone.

    RANK=r WORLD_SIZE=n ... python -m sparselong.finetune.rank AXOLOTL_YAML

Ranks other than 0 leave no files: Axolotl's own output goes to a temporary directory, and its
loggers are off. Ranks that share experts and vocabulary load only their part: the whole run is
inside the settings block that says so. See processes/world.py and processes/launch.py.
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
from sparselong.parallel import shard_model
from sparselong.processes import (
    decide_sharing,
    end_at_once,
    tell_failures,
    telling_memory,
    write_failure,
)
from sparselong.processes import world as ranks
from sparselong.registration import set_environment
from sparselong.runtime import using

_RUN = "axolotl.cli.main"


def main(path: Path) -> None:
    """Train by the YAML at `path`, as the rank given by the environment variables."""
    set_environment()
    rank = int(os.environ["RANK"])
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    run = TrainingRun.open(Path(document[RUN_KEY]))
    tell_failures(run.work, rank)
    end_at_once()
    ranks.connect()
    shared_by = decide_sharing(run.config).chosen
    mesh = ranks.join(run.config.sequence_parallel_degree, shared_by)
    with ExitStack() as stack:
        if rank > 0:
            own = stack.enter_context(tempfile.TemporaryDirectory(prefix="sparselong-rank-"))
            document |= {"output_dir": own}
            path = Path(own) / "axolotl.yaml"
            path.write_text(yaml.safe_dump(document), encoding="utf-8")
        stack.enter_context(ranks.watched(partial(write_failure, run.work, rank)))
        stack.enter_context(telling_memory())
        stack.enter_context(using(**shard_model(mesh)))
        _train(path)


def _train(path: Path) -> None:
    command = importlib.import_module(_RUN).cli
    # Not standalone: click would print "Aborted!" in place of an EOFError, and no traceback.
    command(["train", str(path), "--launcher", "python"], standalone_mode=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
