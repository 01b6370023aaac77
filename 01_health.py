#!/usr/bin/env python3
"""Stage 01: can this machine run this config? Nothing is downloaded, trained or changed.

    python 01_health.py [--config FILE] [--run-dir DIR] [key.path=value …] [--dry-run] [--json]

Prints one row per check (ok, warn or fail, each with its fix), then what the config takes: bytes
per GPU by component, bytes on disk, estimated time. Leaves runs/NAME/01_health/report.json and
report.md, and a manifest when the machine is ready. The checks are made again at every call: what
was true yesterday may not be today.

Exit 0 when the machine can run the config, 1 when it cannot, 2 on a usage or config error.
"""

import sys

from sparselong.memory import plan_stage, show_plan
from sparselong.run import Stage, run_stage


def execute(stage: Stage) -> None:
    """Import what probes the machine only once the command line and the config are right."""
    from sparselong.health import examine

    examine(stage)


def main(argv: list[str] | None = None) -> int:
    """Run the stage; return its exit code."""
    return run_stage(
        "01_health",
        "Can this machine run this config?",
        argv,
        execute,
        plan_stage,
        show_plan,
        keep_result=False,
    )


if __name__ == "__main__":
    sys.exit(main())
