#!/usr/bin/env python3
"""Stage 01: can this machine run this config? Nothing is downloaded, trained or changed.

    python 01_health.py [--config FILE] [--run-dir DIR] [key.path=value …] [--dry-run] [--json]

Prints one row per check (ok, warn or fail, each with its fix), then what the config takes: bytes
per GPU by component, bytes on disk, estimated time. Leaves runs/NAME/01_health/report.json and
report.md, and a manifest when the machine is ready. The answer is made anew at every call: what was
true yesterday may not be today.

Exit 0 when the machine can run the config, 1 when it cannot, 2 on a usage or config error.
"""

from __future__ import annotations

import sys

from sparselong import memory
from sparselong.health import examine
from sparselong.run import run_stage


def main(argv: list[str] | None = None) -> int:
    """Runs the stage; returns its exit code."""
    return run_stage(
        "01_health",
        "Can this machine run this config?",
        argv,
        execute=examine,
        plan=memory.plan_stage,
        show_plan=memory.show_plan,
        keep_result=False,
    )


if __name__ == "__main__":
    sys.exit(main())
