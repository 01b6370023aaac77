"""Run a numbered script as a child process, as a person would run it, and take its document.

The script cannot outlive this process: it gets SIGTERM when this process is interrupted, on which
it ends as on Ctrl-C, and the kernel kills it when this process is killed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparselong.processes.process import die_with_parent

_GRACE_SECONDS = 60


class Ended(NamedTuple):
    """How a script ended.

    Attributes:
        code: its exit code; below 0 the signal that killed it.
        document: the JSON document that it printed: a manifest, or an explained failure; None if
            it printed none.
    """

    code: int
    document: dict[str, Any] | None


def run_script(script: Path, arguments: Sequence[str]) -> Ended:
    """Run a script with `--json` to its end; its stderr is this process's.

    Args:
        script: the script's file.
        arguments: its command line, without `--json`.
    """
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments, "--json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    try:
        output, _ = process.communicate()
    except BaseException:
        process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    return Ended(process.returncode, _document(output))


def _document(output: str) -> dict[str, Any] | None:
    try:
        document = json.loads(output)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None
