"""Starts a script that runs kernels in Triton's interpreter, and reads its results.

Each script runs in its own process, which patches Triton's interpreter; Triton has been imported in
advance, with the interpreter chosen before.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def run_interpreted(python: str, name: str) -> Any:
    """Run `tests/kernels/<name>.py` and return the JSON document it prints last."""
    done = subprocess.run(
        [python, "-m", f"tests.kernels.{name}"],
        cwd=ROOT,
        env={**os.environ, **INTERPRETED},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
