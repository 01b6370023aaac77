"""Starts a script that runs kernels in Triton's interpreter, and reads what it found.

In a process of its own, because the interpreter must be chosen before Triton is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_interpreted(name: str) -> Any:
    """What `tests/kernels/<name>.py` prints last, a JSON document."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.kernels.{name}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
