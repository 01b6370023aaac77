"""Stage 01: check whether this machine can run a config before anything is downloaded or computed.

machine.py gathers facts (with packages.py, sources.py and inputs.py), check.py and resources.py
compare them with the plan, and report.py prints the result. `examine` is the stage: it writes
report.json and report.md if there is a plan; the manifest is written only if the machine can run
the config.
"""

from __future__ import annotations

import json
from typing import Any

from sparselong import memory
from sparselong.config import Config
from sparselong.errors import StageError
from sparselong.files import write_atomically
from sparselong.health import report
from sparselong.health.check import check
from sparselong.health.machine import Machine, probe
from sparselong.health.rows import Row
from sparselong.memory import Plan
from sparselong.run import Stage


def plan_for(config: Config, machine: Machine) -> Plan:
    """Return the plan for the device that the stages would use: a GPU if torch can use one."""
    gpus, host = machine.usable_gpus, machine.host_available_bytes
    if not gpus:
        return memory.make_plan(config)
    return memory.make_plan(config, "cuda", gpus[0].name, gpus[0].total_bytes, host)


def examine(stage: Stage) -> None:
    """Execute stage 01: probe the machine, check it and report.

    Raises:
        StageError: a check fails, so this machine cannot run this config.
    """
    machine = probe(stage.config, stage.run_dir)
    plan = plan_for(stage.config, machine)
    rows = check(stage.config, machine, plan)
    document = report.build(stage.config, machine, plan, rows)
    report.print_table(document)
    write_atomically(stage.dir / "report.json", json.dumps(document, indent=1) + "\n")
    write_atomically(stage.dir / "report.md", report.markdown(document))
    failed = [row for row in rows if row.status == "fail"]
    if failed:
        raise _refusal(stage.config, machine, failed, document)
    stage.log(report.verdict(document))
    stage.outputs += [stage.dir / "report.json", stage.dir / "report.md"]
    counts = {status: sum(row.status == status for row in rows) for status in ("ok", "warn")}
    stage.metrics |= {"ready": True, **counts, "rows": document["rows"], "plan": document["plan"]}


def _refusal(
    config: Config, machine: Machine, failed: list[Row], document: dict[str, Any]
) -> StageError:
    """Return the failure of the stage: that of stage 02 if only inputs are wrong."""
    details = {"rows": document["rows"], "plan": document["plan"]}
    errors = [finding.error for finding in machine.inputs if finding.error is not None]
    if len(errors) == len(failed):
        error = errors[0]
        return StageError(error.what, error.expected, error.found, error.fix, details)
    return StageError(
        f"this machine cannot run this config ({config.model.base})",
        "no failed check",
        "\n".join(f"{row.check}: {row.found}" for row in failed),
        "\n".join(f"{row.check}: {row.fix}" for row in failed),
        details=details,
    )
