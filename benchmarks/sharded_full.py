#!/usr/bin/env python3
"""Full fine-tuning sharded over GPUs: losses as on one GPU, and tokens per second.

A model of gpt-oss-20b's shape with fewer layers and random weights trains all its parameters by
FSDP2 or, if DeepSpeed is installed, ZeRO-3, with our attention, transformers' eager and flex.
Master weights and AdamW are fp32, computation is bf16. A row is one GPU's sequence.

- `loss`, `gradient_norm`: five steps of one GPU, which takes the rows one after the other, and of
  all GPUs; `largest_difference` is relative.
- `throughput`, `peak_bytes`: per GPU at each length, or `out_of_memory`.

Needs two GPUs; `--shape tiny` runs on a CPU, by gloo. Exit code 1 if losses differ by more than
rounding explains.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from benchmarks.command_line import add_result, command_of, machine_of
from benchmarks.context_parallel_launch import finish, start
from benchmarks.record import row, write
from benchmarks.sharded_step import ATTENTION, config_of, make_step

WAYS = ("fsdp2", "zero3")
TOLERANCES = {"20b": 2e-2, "tiny": 1e-5}
"""Relative difference that rounding explains, of bf16 and of fp32."""
STEPS = 5
UNITS = {"throughput": "tokens/s", "peak_bytes": "bytes", "out_of_memory": "1"}


def work(args: argparse.Namespace) -> None:
    """Train in this process; rank 0, or one that is out of memory, writes what it found."""
    on_gpu = args.shape == "20b"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    tokens = torch.randint(
        int(config_of(args).vocab_size or 0),
        (args.rows, args.tokens),
        generator=torch.Generator().manual_seed(1),
    )
    rows, steps, begin = tokens[rank::size].to(device), [], 0.0
    try:
        step = make_step(args, device)
        torch.cuda.reset_peak_memory_stats() if on_gpu else None
        for n in range(STEPS):
            begin = time.perf_counter() if n == STEPS - 2 else begin  # those before are warm-up
            steps.append(step(rows))  # which waits for the device
    except torch.cuda.OutOfMemoryError:
        Path(args.out).write_text('{"out_of_memory": 1}', encoding="utf-8")
        os._exit(1)  # the launcher ends those that wait for this process
    found = {"steps": steps, "seconds": (time.perf_counter() - begin) / 2}
    found["peak_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else 0
    if rank == 0:
        Path(args.out).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def launch(args: argparse.Namespace, processes: int, **case: Any) -> dict[str, Any]:
    """Train in new processes; return what they found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        ranks = start(processes, 0, args, out, __file__, peer=True, **case)
        ended = finish(ranks, time.monotonic() + args.timeout_seconds)
        found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    if not ended and "out_of_memory" not in found:
        sys.exit(f"{case} failed in {processes} processes")
    print(processes, case, found, file=sys.stderr, flush=True)
    return found


def compare(args: argparse.Namespace, way: str) -> tuple[list[dict[str, Any]], float]:
    """Return rows of losses and norms by one and all processes, and their largest difference."""
    case: dict[str, Any] = {"tokens": args.lengths[0], "rows": args.processes, "attention": "ours"}
    one, all_of_them = (launch(args, n, way=way, **case)["steps"] for n in (1, args.processes))
    rows = []
    for processes, steps in ((1, one), (args.processes, all_of_them)):
        for n, (loss, norm) in enumerate(steps):
            where = case | {"layers": args.layers, "processes": processes, "step": n + 1}
            rows += [
                row(where, way, "loss", loss, "nats"),
                row(where, way, "gradient_norm", norm, "1"),
            ]
    pairs = zip(sum(one, []), sum(all_of_them, []), strict=True)
    return rows, max(abs(b / a - 1) for a, b in pairs)


def main() -> None:
    """Measure and write the results; exit 1 if losses differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="20b", choices=TOLERANCES)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192, 16384])
    parser.add_argument("--arms", nargs="+", default=list(ATTENTION), choices=ATTENTION)
    parser.add_argument("--timeout-seconds", type=int, default=300, help="of one training")
    add_result(parser)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.settings:
        return work(argparse.Namespace(**args.settings))
    args.processes = torch.cuda.device_count() if args.shape == "20b" else 2
    if args.processes < 2:
        return print("benchmarks/sharded_full.py needs two CUDA devices: nothing measured")
    rows, differences, machine = [], [], machine_of(args)
    ways = [way for way in WAYS if way == "fsdp2" or importlib.util.find_spec("deepspeed")]
    for way in ways:
        found, difference = compare(args, way)
        differences.append(difference)
        rows += [*found, row({"layers": args.layers}, way, "largest_difference", difference, "1")]
        for tokens in args.lengths:
            for arm in args.arms:
                case = {"tokens": tokens, "rows": args.processes, "attention": arm}
                found = launch(args, args.processes, way=way, **case)
                case |= {"layers": args.layers, "processes": args.processes}
                found["throughput"] = tokens / found["seconds"] if "seconds" in found else 0.0
                for metric, unit in UNITS.items():
                    rows += [row(case, way, metric, found[metric], unit)] if metric in found else []
            write("full_finetune", machine, command_of(__file__, args), rows, args.folder)
    if max(differences) > TOLERANCES[args.shape]:
        sys.exit(f"losses differ from one process's: {dict(zip(ways, differences, strict=True))}")


if __name__ == "__main__":
    main()
