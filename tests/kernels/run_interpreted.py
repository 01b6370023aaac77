"""Starts a script that runs kernels in Triton's interpreter, and reads its results.

The script runs in its own process, because the interpreter must be chosen before importing Triton.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_interpreted(name: str) -> Any:
    """Run `tests/kernels/<name>.py` and return the JSON document it prints last."""
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
