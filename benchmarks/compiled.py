#!/usr/bin/env python3
"""A training step of gpt-oss-20b's layers under torch.compile, beside the same step without.

A few layers in the 20b's widths with random weights and LoRA on attention, arm `lora` of
train_step.py, but without gradient checkpointing: both arms then keep the same. A step is forward,
backward and optimizer on one conversation. `compiled` is `torch.compile(model, fullgraph=True)`,
which raises on a break. Its lengths are measured in one process, in order: the first is compiled
for itself, the second for all lengths. Both arms make the first loss from the same weights and
tokens. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters

from benchmarks.command_line import add_result, command_of, has_device, machine_of
from benchmarks.record import row, write
from benchmarks.shape_20b import ALPHA, PROJECTIONS, R, build_packed, config_20b
from benchmarks.train_step import make_step
from sparselong.model.fused import chunk_loss, fuse

ARMS = ("eager", "compiled")


def build(layers: int) -> Any:
    """Return the model; the same weights in every call."""
    torch.manual_seed(0)
    model = build_packed(config_20b(layers), "lora")
    fuse(model)
    chunk_loss(model)
    lora = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(PROJECTIONS))
    return get_peft_model(model, lora).train()


def count() -> tuple[int, int]:
    """Return the graphs compiled and the breaks in them, so far."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def measure(arm: str, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[float]]:
    """Return one arm's rows, and the first loss at each length."""
    model, rows, losses = build(args.layers), [], []
    torch._dynamo.reset()
    counters.clear()
    run = torch.compile(model, fullgraph=True) if arm == "compiled" else model
    for tokens in args.lengths:
        torch.manual_seed(tokens)
        ids = torch.randint(model.config.vocab_size, (1, tokens), device="cuda")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()  # the first loss depends on the frozen weights alone
        before = count()
        seconds, first = time_steps(make_step_of(run, model, ids), args.rounds)
        losses.append(first)
        graphs, breaks = (now - then for now, then in zip(count(), before, strict=True))
        figures = {
            "step_seconds": (statistics.median(seconds[args.warm_up :]), "s"),
            "first_step_seconds": (seconds[0], "s"),
            "graphs": (graphs, "graphs"),
            "breaks": (breaks, "breaks"),
            "allocated_bytes": (torch.cuda.max_memory_allocated(), "bytes"),
            "loss": (first, "nats"),
        }
        case = {"tokens": tokens, "layers": args.layers}
        rows += [row(case, arm, name, *figure) for name, figure in figures.items()]
        print(f"{arm:9} {tokens:6}: {figures}", file=sys.stderr)
    return rows, losses


def make_step_of(run: Any, model: Any, ids: torch.Tensor) -> Any:
    """Return train_step.py's step on `ids`, run by `run` on the model's parameters."""
    return make_step(_Runs(run, model), ids)


class _Runs:
    """A model's parameters, and a call that may be compiled."""

    def __init__(self, run: Any, model: Any):
        self.run, self.parameters = run, model.parameters

    def __call__(self, **batch: Any) -> Any:
        return self.run(**batch)


def time_steps(step: Any, rounds: int) -> tuple[list[float], float]:
    """Return every step's seconds and the first one's loss."""
    seconds, losses = [], []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds):
        begin = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds, losses[0]


def main() -> None:
    """Measure both arms at all lengths and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192, 6144])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=3)
    add_result(parser)
    args = parser.parse_args()
    if not has_device(__file__):
        return
    machine, rows, losses = machine_of(args), [], {}
    for arm in ARMS:
        found, losses[arm] = measure(arm, args)
        rows += found
        torch.cuda.empty_cache()
    for tokens, one, other in zip(args.lengths, *losses.values(), strict=True):
        case = {"tokens": tokens, "layers": args.layers}
        rows.append(row(case, "compiled", "loss_difference", other - one, "nats"))
    print(write("compiled", machine, command_of(__file__, args), rows, args.folder))


if __name__ == "__main__":
    main()
