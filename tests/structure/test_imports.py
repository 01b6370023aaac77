"""What a refusal may import: no torch and nothing as heavy, seen in what Python really loads."""

import subprocess
import sys

import pytest

from tests.structure.tree import ROOT

HEAVY = {"torch", "transformers", "triton", "numpy", "datasets", "peft", "accelerate", "axolotl"}
LIGHT = (
    "import sparselong",
    "from sparselong.config import Config, schema; schema.load('configs/tiny.yaml', [])",
    "from sparselong.memory import make_plan, show_plan",
    "from sparselong.run import run_stage",
    "from sparselong.report import write_page",
    "from sparselong.compare import compare",
    "from sparselong.data import conversations, demo",
    "from sparselong.kernels.attention import describe_choice",
    "import sparselong.model, sparselong.kernels.experts, sparselong.adapters",
)
MARK = "then:"


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """Top-level packages that each statement adds, in one process, by `-X importtime`."""
    tell = f"import sys; print({MARK!r}, file=sys.stderr)"
    script = "\n".join(f"{tell}\n{line}" for line in (*LIGHT, "import numpy"))
    command = [sys.executable, "-X", "importtime", "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    parts = done.stderr.split(MARK)[1:]
    names = [
        {
            row.rpartition("|")[2].strip().partition(".")[0]
            for row in part.splitlines()
            if row.startswith("import time:")
        }
        for part in parts
    ]
    return dict(zip((*LIGHT, "heavy"), names, strict=True))


@pytest.mark.parametrize("statement", LIGHT)
def test_nothing_heavy_is_imported(loaded, statement):
    assert "sparselong" in loaded[statement]
    assert loaded[statement] & HEAVY == set()


def test_a_heavy_import_would_be_noticed(loaded):
    assert loaded["heavy"] & HEAVY == {"numpy"}
