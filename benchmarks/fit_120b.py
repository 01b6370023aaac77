#!/usr/bin/env python3
"""Real training steps in gpt-oss-120b's exact shape, within 24 GB cards' memory.

Every GPU holds its part of packed random weights made in place: experts and vocabulary are sharded
over the GPUs that share the sequence, everything else is on each. A step shards the sequence,
computes the loss, runs backward, reduces gradients and takes an optimizer step, as stage 03 does.
Torch may reserve only what 23.6 GiB leave after the CUDA context and NCCL.

A degree below the number of GPUs trains several sequences at once, each shared by that many GPUs,
which all still share one copy of experts and vocabulary.

`half` needs two GPUs: half the experts, vocabulary and tokens of `whole` put the same weights,
adapters, tokens and rows per expert on each GPU as `whole` does on four. It says nothing about the
exchanges' bytes, full attention at 16,384 tokens, or NCCL's buffers for four.

With `--placement host` experts are in page-locked host memory, and `whole` runs on one GPU or more.
Every layer has its own random bytes, drawn on the GPU. One process per GPU measures all lengths of
an arm, the shortest first. Also measured are a step without copies and its copies by themselves
(`host_copies.py`), the same with slower copies, resident host memory, and whether the experts'
bytes after all steps are those of before. `--equal-layers` compares loss and gradients with those
of experts on the GPU, bit for bit, in so few layers that they fit there.

How layers compute (slices of rows, inputs in host memory, attention's backend) is as stage 03's
planner decides for GPUs of this memory.

| arm     | adapters                                                         | optimizer       |
|---------|------------------------------------------------------------------|-----------------|
| masked  | LoRA r 16 through 2:4 int4 attention, as stage 03                | AdamW, fp32     |
| experts | the same, and r 8 on every expert in bf16 and r 16 on the router | AdamW with 8 bit |

Compute time is the union of the intervals in which any kernel but NCCL's runs; an exchange is
hidden while its kernel runs beside one of those. NCCL's kernels also wait for the other processes,
so transfers are measured where an exchange's kernel is shortest: in the process that comes last.
Bytes are counted at the calls. Each case runs in its own processes; one that does not fit is
recorded as such. Needs two or four CUDA devices.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from benchmarks.command_line import add_result, command_of, machine_of
from benchmarks.context_parallel_launch import finish as finish_processes
from benchmarks.context_parallel_launch import limit_multiprocessors, start
from benchmarks.fit_120b_plan import CAP_BYTES, SHAPES, keeps_attention, plan, settle_layers
from benchmarks.host_copies import host_memory, measure_parts
from benchmarks.intervals import profile_step, sum_transfers
from benchmarks.record import row, write
from sparselong.files import write_atomically
from sparselong.model import check_unchanged

LIMIT_TOKENS_PER_SECOND = 23_774
"""Arithmetic limit of one H200 for the 120b at 16,384 tokens: forward, recomputation and dX."""
LEAST = ("hidden_", "copies_rate", "tensors_", "unchanged_")
"""Beginnings of the names of figures of which the smallest is the worst."""
Rows = list[dict[str, Any]]
Case = dict[str, Any]
Figures = dict[str, float]


def work(args: argparse.Namespace) -> None:
    """Measure an arm at some lengths on this rank; rank 0 writes the rows after each."""
    from sparselong.parallel.mesh import build_mesh

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=args.timeout_seconds)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout)
    mesh = build_mesh(args.degree or args.gpus, timeout, expert_size=args.gpus)
    torch.cuda.set_per_process_memory_fraction((CAP_BYTES - args.spare) / total_bytes())
    cases = [make_case(args, tokens, mesh.context_size) for tokens in args.lengths]
    rows: Rows = []
    try:
        for case, found in measure_all(cases, args, mesh):
            rows += [row(case, "sparselong", name, found[name], unit_of(name)) for name in found]
            if dist.get_rank() == 0:
                write_atomically(Path(args.out), json.dumps(rows))
    except torch.OutOfMemoryError as error:
        print(f"rank {dist.get_rank()}: {error}", file=sys.stderr, flush=True)
        done = {each["case"]["tokens"] for each in rows}
        failed = next((case for case in cases if case["tokens"] not in done), cases[-1])
        rows.append(row(failed, "sparselong", "out_of_memory", 1, "1"))
        write_atomically(Path(args.out), json.dumps(rows))
        raise
    dist.destroy_process_group()


def make_case(args: argparse.Namespace, tokens: int, degree: int) -> Case:
    """Return the case of a length: what was asked for, and what the planner decides."""
    case = {"shape": args.shape, "arm": args.arm, "tokens": tokens, "layers": args.layers}
    case |= {"gpus": args.gpus, "degree": degree, "peer": args.peer}
    case |= {"multiprocessors": args.multiprocessors, "placement": args.placement}
    case |= settle_layers(case)
    keeps = args.keep_attention
    if keeps == "auto":
        keeps = "always" if keeps_attention(case) else "never"
    return case | {"keep_attention": keeps, "copy_limit": None}


def measure_all(
    cases: list[Case], args: argparse.Namespace, mesh: Any
) -> Iterator[tuple[Case, Figures]]:
    """Yield each case with its figures, those of the slowest or fullest rank."""
    from benchmarks import fit_120b_model as model

    if args.equal_layers:
        for case in cases:
            case |= {"layers": args.equal_layers}
            yield case, merge(model.compare_placements(case, args, mesh), mesh)
        return
    torch.zeros(1, device="cuda")
    at_rest = outside_torch()
    own = model.prepare(cases[0], mesh)
    optimizer = model.make_optimizer(args.arm, own.trained)
    for number, case in enumerate(cases):
        model.arrange_layers(own, case)
        step = model.make_step(own, optimizer, case, args.stride)
        yield case, measure(case, step, own, args, mesh, at_rest)
        if own.host is None:
            continue
        limits = [None, *(args.copy_limits if number == 0 else [])]
        for limit in limits:
            parts = measure_parts(own.host, partial(finish, step), partial(wait, mesh), 2, limit)
            parts["streamed_throughput"] = case["tokens"] / parts["streamed_step_seconds"]
            yield case | {"copy_limit": limit}, merge(parts, mesh)
    if own.host is not None:
        receipt = check_unchanged(own.host, own.hashes)
        found = {"unchanged_tensors": receipt["tensors"], **host_memory(own.host)}
        yield cases[-1], merge(found, mesh)


def finish(step: Callable[[], torch.Tensor]) -> float:
    """Make a step, wait for the GPU and return the loss."""
    loss = float(step())
    torch.cuda.synchronize()
    return loss


def wait(mesh: Any) -> None:
    """Wait for all ranks, over gloo, as stage 03 waits."""
    from sparselong.parallel.collectives import all_gather

    all_gather(torch.zeros(1), mesh.world_group, "barrier")


def total_bytes() -> int:
    """Return the memory of the current GPU."""
    return torch.cuda.mem_get_info()[1]


def outside_torch() -> int:
    """Return memory of the current GPU that torch has not reserved: context, libraries, NCCL."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def measure(
    case: Case, step: Callable[[], torch.Tensor], own: Any, args: argparse.Namespace, mesh: Any,
    at_rest: int,
) -> Figures:  # fmt: skip
    """Return a case's memory by component, times, bytes and overlap of the slowest rank."""
    from sparselong.parallel.collectives import count_bytes

    found = {"context_bytes": at_rest, **own.resident}
    torch.cuda.empty_cache()  # of what a shorter case has left
    seconds, loss = [], 0.0
    for number in range(args.warm_up + args.rounds):
        wait(mesh)
        begin = time.perf_counter()
        loss = finish(step)
        seconds.append(time.perf_counter() - begin)
        if number == 0:
            found["first_step_seconds"] = seconds[0]
            torch.cuda.reset_peak_memory_stats()
    outside = outside_torch()
    found |= {
        "step_seconds": statistics.median(seconds[args.warm_up :]),
        "nccl_bytes": outside - found["context_bytes"],
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "device_bytes": torch.cuda.max_memory_reserved() + outside,
        "launch_seconds": time_launch(),
        **host_memory(own.host),
    }
    with count_bytes() as sent:
        step()
    found |= {f"sent_bytes: {tag}": count for tag, count in sent.items()}
    found["sent_bytes"] = sum(sent.values())
    found |= measure_kernels(step, case["layers"], mesh.world_group)
    worst = merge(found, mesh) | plan(case)
    worst["throughput"] = case["tokens"] * mesh.data_size / worst["step_seconds"]
    per_gpu = case["tokens"] / case["degree"]
    for name in ("compute", "step"):
        rate = per_gpu / worst[f"{name}_seconds"]
        worst[f"{name}_share_of_limit"] = rate / LIMIT_TOKENS_PER_SECOND
    worst["loss"] = loss
    tell(case, worst)
    return worst


def merge(found: Figures, mesh: Any) -> Figures:
    """Return the figures of the slowest rank, or of that with most bytes; all ranks call this."""
    from sparselong.parallel.collectives import all_gather

    names = sorted(all_names(found, mesh.world_group))
    mine = torch.tensor([float(found.get(name, 0.0)) for name in names], dtype=torch.float64)
    ranks = torch.stack([each.cpu() for each in all_gather(mine, mesh.world_group, "figures")])
    worst = dict(zip(names, ranks.amax(0).tolist(), strict=True))
    least = dict(zip(names, ranks.amin(0).tolist(), strict=True))
    return worst | {name: least[name] for name in names if name.startswith(LEAST)}


def measure_kernels(step: Callable[[], Any], layers: int, group: Any) -> dict[str, float]:
    """Return what a profiled step's kernels took, and its transfers if ranks made equal calls."""
    from sparselong.parallel.collectives import all_gather

    profile = profile_step(step)
    calls = torch.tensor(profile.calls(), dtype=torch.float64).view(-1, 2)
    counts = torch.stack(all_gather(torch.tensor([len(calls)]), group, "figures"))
    found = profile.summarize(layers)
    if len(calls) and (counts == len(calls)).all():
        found |= sum_transfers(torch.stack(all_gather(calls, group, "figures")))
    return found


def unit_of(name: str) -> str:
    """Return the unit of a figure by the last word of its name."""
    units = {"bytes": "bytes", "seconds": "s", "throughput": "tokens/s"}
    units |= {"loss": "nats", "rate": "bytes/s"}
    return units.get(name.split(":")[0].split("_")[-1], "1")


def all_names(found: dict[str, Any], group: Any) -> set[str]:
    """Return the names of figures that every rank has; bytes are counted where they are sent."""
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, list(found), group=group)
    shared = set(found).intersection(*map(set, every))
    return shared | {name for names in every for name in names if name.startswith("sent_bytes")}


def tell(case: Case, worst: Figures) -> None:
    """Print a case's figures on rank 0."""
    if dist.get_rank() == 0:
        print(case, file=sys.stderr)
        for name, value in worst.items():
            shown = f"{value / 2**30:9.3f} GiB" if "bytes" in name else f"{value:9.4f}"
            print(f"    {shown}  {name}", file=sys.stderr, flush=True)


def time_launch() -> float:
    """Return the host's seconds for the launch of a kernel that does nothing."""
    for _ in range(10):
        torch.cuda._sleep(0)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(500):
        torch.cuda._sleep(0)
    return (time.perf_counter() - begin) / 500


def parse() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="whole", choices=SHAPES)
    parser.add_argument("--arms", nargs="+", default=["masked", "experts"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[16_384, 4096])
    parser.add_argument("--gpus", type=int, help="by default those of the shape")
    parser.add_argument("--degree", type=int, help="GPUs that share a sequence; by default all")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--placement", default="gpu", choices=("gpu", "host"), help="of experts")
    parser.add_argument(
        "--copy-limits",
        nargs="*",
        type=float,
        default=[],
        metavar="RATE",
        help="with --placement host: bytes a second to which copies are slowed at the first length",
    )
    parser.add_argument(
        "--equal-layers", type=int, help="compare both placements in so many layers, nothing else"
    )
    parser.add_argument(
        "--keep-attention",
        default="auto",
        choices=("auto", "always", "never"),
        help="keep full attention's output; by default if the plan fits, as in stage 03",
    )
    parser.add_argument(
        "--peer",
        nargs="+",
        default=["on"],
        choices=("on", "off"),
        help="peer access; off is NCCL_P2P_DISABLE=1",
    )
    parser.add_argument(
        "--multiprocessors",
        type=int,
        default=100,
        metavar="PERCENT",
        help="part of each GPU's multiprocessors that is used, as if it were a smaller GPU",
    )
    parser.add_argument("--stride", type=int, default=4, help="heads_k_stride")
    parser.add_argument("--spare", type=int, default=1400 << 20, help="bytes for context and NCCL")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before those measured")
    parser.add_argument("--rounds", type=int, default=3, help="measured steps")
    parser.add_argument("--timeout-seconds", type=int, default=240, help="timeout of each case")
    add_result(parser)
    parser.add_argument("--subject", default="fit_120b", help="first part of the file name")
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run all cases and write the results."""
    args = parse()
    if args.settings:
        work(argparse.Namespace(**json.loads(args.settings)))
        return
    args.gpus = args.gpus or SHAPES[args.shape][0]
    if torch.cuda.device_count() < args.gpus:
        print(f"benchmarks/fit_120b.py needs {args.gpus} CUDA devices: nothing measured")
        return
    rows: Rows = []
    machine, command = machine_of(args), command_of(__file__, args)
    together = args.placement == "host"  # filling host memory takes long
    lengths = [sorted(args.lengths)] if together else [[length] for length in args.lengths]
    with limit_multiprocessors(args.multiprocessors):
        for peer, arm, some in product(args.peer, args.arms, lengths):
            rows += run_case(args, arm=arm, lengths=some, peer=peer == "on")
            write(args.subject, machine, command, rows, args.folder)  # in case a later one fails


def run_case(args: argparse.Namespace, **case: Any) -> Rows:
    """Measure an arm at some lengths in processes of their own and return the rows."""
    out = args.folder / "fit_120b.part"
    out.unlink(missing_ok=True)
    processes = start(args.gpus, 0, args, out, __file__, **case)
    ended = finish_processes(processes, time.monotonic() + args.timeout_seconds)
    rows = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    out.unlink(missing_ok=True)
    if not ended:
        print(f"failed: {case}, {len(rows)} rows kept", file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
