#!/usr/bin/env python3
"""Makes BENCHMARKS.md and its plots from the files in benchmarks/results, and from nothing else.

Of a subject measured several times on one machine the newest file counts. Every subject's section
is a function in a file of its own, `report_<subject>.py`; this one puts them behind one another.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
matplotlib.use("Agg")

from benchmarks import (
    report_attention,
    report_context_parallel,
    report_expert_gemm,
    report_generation,
    report_memory,
    report_neighbours,
    report_train_step,
)
from benchmarks.record import RESULTS

PAGE = RESULTS.parent.parent / "BENCHMARKS.md"
HEAD = """# Benchmarks

Made by `benchmarks/report.py` from `benchmarks/results/*.json`, which hold the command, the machine
and the versions of every figure. Edit neither by hand.
"""
SECTIONS = (
    report_train_step.write_section,
    report_memory.write_section,
    report_context_parallel.write_section,
    report_attention.write_section,
    report_expert_gemm.write_section,
    report_generation.write_section,
    report_neighbours.write_section,
)


def main() -> None:
    page = HEAD + "".join(section() for section in SECTIONS)
    PAGE.write_text(page, encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
