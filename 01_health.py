#!/usr/bin/env python3
"""Stage 01: check whether this machine can run a config. Downloads and trains nothing.

    python 01_health.py [--config FILE] [--run-dir DIR] [key.path=value …] [--dry-run] [--json]

Prints one row per check (ok, warn or fail, with a fix), then what the config needs: bytes per GPU
by component, bytes on disk, estimated time. What is on this machine of the base checkpoint, its
tokenizer and the training data is opened as stage 02 opens it. Writes
runs/NAME/01_health/report.json and report.md, and a manifest if the machine can run the config. The
checks are repeated on every call because the machine may have changed.

Exit code 0 if the machine can run the config, 1 if it cannot, 2 for a usage or config error.
"""

import sys

from sparselong.config import Config
from sparselong.data import check_tasks
from sparselong.memory import check_model, plan_stage, show_plan
from sparselong.processes import check_alone
from sparselong.report import write_page
from sparselong.run import Stage, run_stage


def execute(stage: Stage) -> None:
    """Check the machine; imported only after the command line and the config are validated."""
    from sparselong.health import examine

    examine(stage)


def check(config: Config) -> None:
    """Raise if several processes were started, or the config names what is not there."""
    check_alone()
    check_model(config)
    check_tasks(config)


def main(argv: list[str] | None = None) -> int:
    """Run the stage; return its exit code."""
    return run_stage(
        "01_health",
        "Check whether this machine can run a config.",
        argv,
        execute,
        plan_stage,
        show_plan,
        check=check,
        page=write_page,
    )


if __name__ == "__main__":
    sys.exit(main())
