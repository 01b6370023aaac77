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
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from benchmarks.command_line import add_result, command_of, machine_of
from benchmarks.context_parallel_launch import finish, limit_multiprocessors, start
from benchmarks.intervals import profile_step, sum_transfers
from benchmarks.record import row, write
from sparselong.files import write_atomically

CONFIG = Path(__file__).resolve().parent.parent / "configs/gpt-oss-120b-4x3090.yaml"
CAP_BYTES = int(23.6 * 2**30)
LIMIT_TOKENS_PER_SECOND = 23_774
"""Arithmetic limit of one H200 for the 120b at 16,384 tokens: forward, recomputation and dX."""
EXPERT_LORA = (
    "lora.expert_targets=[gate_up_proj, down_proj]",
    "lora.expert_r=8",
    "lora.expert_dtype=bfloat16",
    "lora.router=true",
    "training.optimizer=adamw_bnb_8bit",
)
SHAPES = {"whole": (4, 128, 201_088), "half": (2, 64, 100_544), "tiny": (2, 8, 4_096)}
"""GPUs, experts and vocabulary."""
Rows = list[dict[str, Any]]


def work(args: argparse.Namespace) -> None:
    """Measure one case on this rank; rank 0 writes the rows."""
    from sparselong.parallel.mesh import build_mesh

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=args.timeout_seconds)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout)
    size = dist.get_world_size()
    mesh = build_mesh(args.degree or size, timeout, expert_size=size)
    torch.cuda.set_per_process_memory_fraction((CAP_BYTES - args.spare) / total_bytes())
    case = {"shape": args.shape, "arm": args.arm, "tokens": args.tokens, "layers": args.layers}
    case |= {"gpus": size, "degree": mesh.context_size, "peer": args.peer}
    case["multiprocessors"] = args.multiprocessors
    if args.keep_attention == "auto":
        args.keep_attention = "always" if keeps_attention(case) else "never"
    case["keep_attention"] = args.keep_attention
    try:
        rows = measure(case, args, mesh)
    except torch.OutOfMemoryError as error:
        print(f"rank {dist.get_rank()}: {error}", file=sys.stderr, flush=True)
        rows = [row(case, "sparselong", "out_of_memory", 1, "1")]
        write_atomically(Path(args.out), json.dumps(rows))
        raise
    if dist.get_rank() == 0:
        write_atomically(Path(args.out), json.dumps(rows))
    dist.destroy_process_group()


def total_bytes() -> int:
    """Return the memory of the current GPU."""
    return torch.cuda.mem_get_info()[1]


def outside_torch() -> int:
    """Return memory of the current GPU that torch has not reserved: context, libraries, NCCL."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def measure(case: dict[str, Any], args: argparse.Namespace, mesh: Any) -> Rows:
    """Return a case's rows: memory by component, times, bytes and overlap of the slowest rank."""
    from sparselong.parallel.collectives import all_gather, count_bytes

    torch.zeros(1, device="cuda")
    found = {"context_bytes": outside_torch()}
    step, resident = prepare(args, mesh)
    found |= resident
    seconds, loss = [], 0.0
    for number in range(args.warm_up + args.rounds):
        all_gather(torch.zeros(1), mesh.world_group, "barrier")  # over gloo, as stage 03 waits
        begin = time.perf_counter()
        loss = float(step())
        torch.cuda.synchronize()
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
    }
    with count_bytes() as sent:
        step()
    found |= {f"sent_bytes: {tag}": count for tag, count in sent.items()}
    found["sent_bytes"] = sum(sent.values())
    found |= measure_kernels(step, case["layers"], mesh.world_group)
    names = sorted(all_names(found, mesh.world_group))
    mine = torch.tensor([float(found.get(name, 0.0)) for name in names], dtype=torch.float64)
    ranks = torch.stack([each.cpu() for each in all_gather(mine, mesh.world_group, "figures")])
    worst = dict(zip(names, ranks.amax(0).tolist(), strict=True))
    least = dict(zip(names, ranks.amin(0).tolist(), strict=True))
    worst |= {name: least[name] for name in names if name.startswith("hidden_")}
    worst |= plan(case)
    worst["throughput"] = case["tokens"] * mesh.data_size / worst["step_seconds"]
    per_gpu = case["tokens"] / case["degree"]
    for name in ("compute", "step"):
        rate = per_gpu / worst[f"{name}_seconds"]
        worst[f"{name}_share_of_limit"] = rate / LIMIT_TOKENS_PER_SECOND
    tell(case, worst, loss)
    rows = [row(case, "sparselong", name, value, unit_of(name)) for name, value in worst.items()]
    return [*rows, row(case, "sparselong", "loss", loss, "nats")]


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
    return units.get(name.split(":")[0].split("_")[-1], "1")


def all_names(found: dict[str, Any], group: Any) -> set[str]:
    """Return the names of figures that every rank has; bytes are counted where they are sent."""
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, list(found), group=group)
    shared = set(found).intersection(*map(set, every))
    return shared | {name for names in every for name in names if name.startswith("sent_bytes")}


def plan(case: dict[str, Any]) -> dict[str, int]:
    """Return what stage 03's planner says of a case: the peak, and bytes by component."""
    from sparselong.memory import Held, Kept, finetune_memory

    shape, config = describe(case)
    kept = Kept(case["keep_attention"] == "always", False)
    made = finetune_memory(shape, config, held=Held(case["gpus"]), kept=kept)
    components = {f"planned_bytes: {name}": size for name, size in made.components.items()}
    return {"planned_bytes": made.peak_bytes, **components}


def keeps_attention(case: dict[str, Any]) -> bool:
    """Return whether stage 03 would keep full attention's output within the cap."""
    from sparselong.memory import Held, is_kept, kept_peaks

    peaks = kept_peaks(*describe(case), held=Held(case["gpus"]))
    return is_kept("auto", peaks["keep_attention"], CAP_BYTES)


def describe(case: dict[str, Any]) -> tuple[Any, Any]:
    """Return a case's shape and config, as the planner takes them."""
    from sparselong.config import load
    from sparselong.memory import PUBLISHED

    overrides = [f"sequence_len={case['tokens']}", f"sequence_parallel_degree={case['degree']}"]
    overrides += ["lora.r=16", *(EXPERT_LORA if case["arm"] == "experts" else ())]
    _, experts, vocab = SHAPES[case["shape"]]
    layers = {"layers": case["layers"], "full_layers": case["layers"] // 2}
    published = PUBLISHED["openai/gpt-oss-120b"]
    shape = dataclasses.replace(published, experts=experts, vocab=vocab, **layers)
    return shape, load(CONFIG, overrides)


def tell(case: dict[str, Any], worst: dict[str, float], loss: float) -> None:
    """Print a case's figures on rank 0."""
    if dist.get_rank() == 0:
        print(case, f"loss {loss:.4f}", file=sys.stderr)
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


def prepare(
    args: argparse.Namespace, mesh: Any
) -> tuple[Callable[[], torch.Tensor], dict[str, int]]:
    """Return a function that makes a step, and the bytes of what is resident, by component."""
    from benchmarks.shape_20b import adapt, build_packed, config_of
    from sparselong.adapters.expert_factors import sharded_parameters
    from sparselong.memory import Kept
    from sparselong.parallel.apply import shard_model
    from sparselong.runtime.settings import using

    _, experts, vocab = SHAPES[args.shape]
    torch.manual_seed(0)  # the same replicated weights on every rank
    before = torch.cuda.memory_allocated()
    kept = Kept(args.keep_attention == "always", False)
    with using(**shard_model(mesh)):
        packed = build_packed(config_of(args.layers, experts, vocab), args.arm)
        resident = {"packed_bytes": torch.cuda.memory_allocated() - before}
        model = adapt(packed, args.arm, kept, expert_dtype=torch.bfloat16)
    resident["weight_bytes"] = torch.cuda.memory_allocated() - before
    sharded = list(sharded_parameters(model).values())
    trained = [p for p in model.parameters() if p.requires_grad]
    resident["adapter_bytes"] = sum(p.nbytes for p in trained)  # included in the weights
    optimizer = make_optimizer(args.arm, trained)
    return make_step(model, optimizer, sharded, args, mesh), resident


def make_optimizer(arm: str, trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return the arm's optimizer, with a learning rate of 0 so that every step is the same."""
    if arm == "experts":
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-untyped]

        return AdamW8bit(trained, lr=0.0)
    return torch.optim.AdamW(trained, lr=0.0, fused=True)


def make_step(
    model: Any, optimizer: Any, sharded: list, args: argparse.Namespace, mesh: Any
) -> Callable[[], torch.Tensor]:
    """Return a function that makes one optimizer step on random tokens and returns the loss."""
    from sparselong.parallel.apply import share_batch
    from sparselong.parallel.gradients import gradient_norm, reduce_gradients
    from sparselong.parallel.loss import add_losses, count_step
    from sparselong.runtime.settings import using

    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(mesh.data_rank)
    ids = torch.randint(SHAPES[args.shape][2], (1, args.tokens), generator=generator).cuda()

    def step() -> torch.Tensor:
        batch = {"input_ids": ids, "labels": ids}
        count = count_step([batch], mesh, args.tokens).divisor
        local, changes = share_batch(batch, mesh, args.stride)
        with using(**changes):
            loss = model(**local, num_items_in_batch=count, use_cache=False).loss
            loss.backward()
        reduce_gradients(trained, mesh, sharded)
        gradient_norm(trained, mesh, sharded)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return add_losses(loss, mesh)

    return step


def parse() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="whole", choices=SHAPES)
    parser.add_argument("--arms", nargs="+", default=["masked", "experts"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[16_384, 4096])
    parser.add_argument("--degree", type=int, help="GPUs that share a sequence; by default all")
    parser.add_argument("--layers", type=int, default=36)
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
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run all cases and write the results."""
    args = parse()
    if args.settings:
        work(argparse.Namespace(**json.loads(args.settings)))
        return
    gpus = SHAPES[args.shape][0]
    if torch.cuda.device_count() < gpus:
        print(f"benchmarks/fit_120b.py needs {gpus} CUDA devices: nothing measured")
        return
    rows: Rows = []
    machine, command = machine_of(args), command_of(__file__, args)
    with limit_multiprocessors(args.multiprocessors):
        for peer, arm, tokens in product(args.peer, args.arms, args.lengths):
            rows += run_case(args, gpus, arm=arm, tokens=tokens, peer=peer == "on")
            write("fit_120b", machine, command, rows, args.folder)  # in case a later one fails


def run_case(args: argparse.Namespace, gpus: int, **case: Any) -> Rows:
    """Run one case in processes of its own and return its rows."""
    out = args.folder / "fit_120b.part"
    out.unlink(missing_ok=True)
    processes = start(gpus, 0, args, out, __file__, **case)
    ended = finish(processes, time.monotonic() + args.timeout_seconds)
    rows = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    out.unlink(missing_ok=True)
    if not ended and not rows:
        print(f"failed: {case}", file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
