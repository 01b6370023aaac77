#!/usr/bin/env python3
"""Stage 02's solver on gpt-oss-20b's attention projections, with random correlated activations.

For each projection: seconds of one sweep over the columns and of the whole solve (factor, draft,
refit, sweep), the share of codes and of mask bits in which the sweep's kernel differs from plain
torch on the CPU (the same arguments, evenly spaced rows), and the outputs' relative error by one
sweep and by llmcompressor's SparseGPT with GPTQ. Inputs share directions of falling strength; two
of their features are thirty times as large as the others.

benchmarks/solver.py [--machine NAME] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.command_line import add_result, command_of, has_device, machine_of
from benchmarks.record import row, write
from sparselong.compress.weights.factor import factorize
from sparselong.compress.weights.solver import compress_weight
from sparselong.kernels.sweep import Swept, sweep_columns
from sparselong.packing import DenseFormat

SHAPES = {"q_proj": (4096, 2880), "k_proj": (512, 2880), "v_proj": (512, 2880),
          "o_proj": (2880, 4096)}  # fmt: skip
FORMAT, DAMPENING = DenseFormat(4, "2:4", 64), 0.01
TOKENS, REPEATS, COMPARED_ROWS = 16_384, 3, 256


def draw(rows: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a bf16 weight and the fp32 Hessian of correlated inputs, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    strength = torch.arange(1, width + 1, device="cuda") ** -0.5
    inputs = (normal(TOKENS, width) * strength) @ normal(width, width)
    inputs += 0.3 * normal(TOKENS, width)
    inputs[:, [7, width // 2]] *= 30.0
    return (0.05 * normal(rows, width)).bfloat16(), 2 / TOKENS * inputs.T @ inputs


def time_median(work: Callable[[], Any]) -> float:
    """Return the median seconds of `work`, after one call that compiles and is not counted."""
    seconds = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def compare_to_cpu(swept: Swept, start: torch.Tensor, factor: torch.Tensor) -> dict[str, float]:
    """Return the shares of codes and of mask bits that plain torch on the CPU finds otherwise."""
    chosen = torch.arange(0, len(start), len(start) // COMPARED_ROWS, device="cuda")
    cpu = sweep_columns(start[chosen].cpu(), factor.cpu(), FORMAT)
    assert swept.codes is not None and swept.mask is not None
    assert cpu.codes is not None and cpu.mask is not None
    return {
        "codes": (swept.codes[chosen].cpu() != cpu.codes).float().mean().item(),
        "mask": (swept.mask[chosen].cpu() != cpu.mask).float().mean().item(),
    }


def measure(name: str) -> list[dict[str, Any]]:
    """Return the figures of one projection."""
    rows, width = SHAPES[name]
    weight, hessian = draw(rows, width, seed=0)
    case = {"projection": name, "rows": rows, "columns": width}
    start, factor = factorize(weight, hessian, DAMPENING, name)
    swept = sweep_columns(start, factor, FORMAT)
    seconds = time_median(lambda: sweep_columns(start, factor, FORMAT))
    found = [row(case, "sweep", "sweep_seconds", seconds, "s")]
    for result, share in compare_to_cpu(swept, start, factor).items():
        found.append(row(case, "sweep", f"different_from_cpu_{result}", share, "1"))
    for solver in ("sweep", "llmcompressor"):
        compress_weight(weight, hessian, FORMAT, DAMPENING, name, solver)  # compiles
        begun = time.perf_counter()
        made = compress_weight(weight, hessian, FORMAT, DAMPENING, name, solver)
        taken = time.perf_counter() - begun
        found.append(row(case, solver, "relative_error", made.relative_error, "1"))
        found.append(row(case, solver, "solve_seconds", taken, "s"))
    return found


def main() -> None:
    """Run the benchmark, if there is a GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add_result(parser)
    args = parser.parse_args()
    if not has_device(__file__):
        return
    machine, rows = machine_of(args), []
    for name in SHAPES:
        rows += measure(name)
        print(*(f"{r['backend']} {r['metric']} {r['value']:.4g}" for r in rows[-7:]), sep="\n")
    print(write("solver", machine, command_of(__file__, args), rows, args.folder))


if __name__ == "__main__":
    main()
