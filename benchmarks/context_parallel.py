#!/usr/bin/env python3
"""One sequence over several GPUs: attention alone, and whole steps in gpt-oss-20b's shape.

Attention: forward and backward of one full and one sliding-window layer at 16,384 tokens, compared
with the arms of `context_parallel_arms.py`. Every arm's output and gradients are first compared
with those of one GPU at 2,048 tokens; an arm whose results differ is not timed. Steps: 20b's shape
with all experts on every GPU, by degree and length, including sharding, loss, backward pass,
reduction of gradients over the ranks, and optimizer. A step that does not fit is recorded as such.

Times are medians over rounds of the slowest rank's time. Bytes are counted at collective calls, on
the busiest rank. Balance is the slowest rank's compute time divided by the mean. Each part runs in
separate processes, one per GPU, with a timeout. `--no-peer` repeats the largest degree with
NCCL_P2P_DISABLE=1, which represents cards without NVLink. Needs two to four CUDA devices.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from benchmarks.command_line import add_result, command_of, machine_of
from benchmarks.context_parallel_launch import make_waves, run_wave
from benchmarks.record import row, write
from sparselong.files import write_atomically

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 64, 8, 64, 128
KINDS = {"full": None, "window": WINDOW}
ROUNDS = 9
Rows = list[dict[str, Any]]


def measure_attention(args: argparse.Namespace, mesh: Any) -> Rows:
    """Return rows of every arm: correctness, times, bytes and balance."""
    from benchmarks.context_parallel_arms import make_arms

    rows: Rows = []
    wrong = check_arms(make_arms(mesh, 2048, args.strides, args.stride), mesh)
    arms = make_arms(mesh, args.attention_tokens, args.strides, args.stride)
    for kind, window in KINDS.items():
        case = {"part": "attention", "kind": kind, "tokens": args.attention_tokens}
        case |= {"degree": mesh.context_size, "peer": args.peer}
        rows += [row(case, name, "wrong", 1, "1") for name in wrong]
        calls = {}
        for name, arm in arms.items():
            if name not in wrong:
                calls[name] = make_call(arm, args.attention_tokens, window)
        for name, times in time_in_turn(calls, mesh).items():
            rows += describe_arm(case, name, times, calls[name], mesh)
    return rows


def draw(tokens: int) -> list[torch.Tensor]:
    """Return q, k, v, sinks and dout of the whole sequence, identical on every rank."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    shapes = [(1, heads, tokens, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (normal(*shape) for shape in shapes)
    return [q, k, v, normal(HEADS).float(), normal(*shapes[0])]


def check_arms(arms: dict[str, Any], mesh: Any) -> set[str]:
    """Return the arms whose out, dq, dk or dv differs from one GPU's on any rank."""
    from sparselong.kernels.attention.op import attention
    from sparselong.parallel.collectives import all_gather

    q, k, v, sinks, dout = draw(2048)
    wrong = set()
    for window in KINDS.values():
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = attention(*leaves, sinks, window=window, backend="triton")[0]
        expected = [out, *torch.autograd.grad(out, leaves, dout)]
        for name, arm in arms.items():
            local = [arm.take(t).clone().requires_grad_() for t in (q, k, v)]
            mine = arm.attend(*local, sinks, window)
            got = [mine, *torch.autograd.grad(mine, local, arm.take(dout).contiguous())]
            pairs = zip(got, map(arm.take, expected), strict=True)
            error = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
            worst = max(map(float, all_gather(torch.tensor([error]), mesh.context_group, "")))
            if not worst < 1e-2:
                tell(f"{name}, window {window}: off by {worst:.2e}, no time shown")
                wrong.add(name)
    return wrong


def make_call(arm: Any, tokens: int, window: int | None) -> Any:
    """Return a function that runs forward and backward of one layer on this rank's shard."""
    q, k, v, sinks, dout = draw(tokens)
    leaves = [arm.take(t).clone().requires_grad_() for t in (q, k, v)]
    dout = arm.take(dout).transpose(1, 2).contiguous().transpose(1, 2)  # the model's layout

    def call() -> None:
        out = arm.attend(*leaves, sinks, window)
        torch.autograd.grad(out, leaves, dout)

    return call


def time_in_turn(calls: dict[str, Any], mesh: Any) -> dict[str, list[float]]:
    """Return each call's device time in ms on the slowest rank, for every round.

    Before each call, the device sleeps, so that the host runs ahead as within a model, and then
    synchronizes with the other ranks.
    """
    from sparselong.parallel.collectives import all_gather

    times: dict[str, list[float]] = {name: [] for name in calls}
    one = torch.ones(1, device="cuda")
    for n in range(ROUNDS + 2):
        for name, call in calls.items():
            torch.cuda._sleep(12_000_000)
            dist.all_reduce(one, group=mesh.context_group)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            mine = torch.tensor([begin.elapsed_time(end)])
            if n >= 2:
                times[name].append(max(map(float, all_gather(mine, mesh.context_group, ""))))
    return times


def describe_arm(case: dict, name: str, times: list[float], call: Any, mesh: Any) -> Rows:
    """Return rows of one arm: median ms, bytes on the busiest rank, balance, ms of compute."""
    from sparselong.parallel.collectives import all_gather, count_bytes

    with count_bytes() as sent:
        call()
    compute = kernel_ms(call)
    mine = torch.tensor([float(sum(sent.values())), compute])
    everyone = torch.stack([t.cpu() for t in all_gather(mine, mesh.context_group, "")])
    busiest = float(everyone[:, 0].max())
    balance = float(everyone[:, 1].max() / everyone[:, 1].mean())
    tell(
        f"P={case['degree']} peer={case['peer']} {case['kind']:6} {name:32} "
        f"{statistics.median(times):8.3f} ms (compute {float(everyone[:, 1].max()):.3f}), "
        f"{busiest / 1e6:7.2f} MB, balance {balance:.3f}"
    )
    return [
        row(case, name, "forward_backward_ms", statistics.median(times), "ms"),
        row(case, name, "compute_ms", float(everyone[:, 1].max()), "ms"),
        row(case, name, "sent_bytes", busiest, "bytes"),
        row(case, name, "balance", balance, "1"),
    ]


def kernel_ms(call: Any) -> float:
    """Return this rank's kernel time of a call in ms, without collectives."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    events = [e for e in trace.key_averages() if "nccl" not in e.key.lower()]
    return sum(event.self_device_time_total for event in events) / 1e3


def measure_steps(arm: str, args: argparse.Namespace, mesh: Any) -> Iterator[Rows]:
    """Yield rows of whole steps of one arm of `shape_20b.py` by length, until one does not fit."""
    from benchmarks.shape_20b import build

    torch.manual_seed(0)  # the same weights on every rank
    keep_experts = args.layers if args.keep_experts == "always" else 0
    model = build(arm, layers=args.layers, keep_experts=keep_experts)
    trained = [p for p in model.parameters() if p.requires_grad]
    # A learning rate of 0 keeps the weights, so that losses of all degrees can be compared.
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    for tokens in args.lengths:
        if tokens < args.least * mesh.context_size:
            continue
        case = {"part": "step", "arm": arm, "tokens": tokens, "layers": args.layers}
        case |= {"degree": mesh.context_size, "peer": args.peer, "heads_k_stride": args.stride}
        case |= {"keep_experts": args.keep_experts}
        try:
            yield measure_length(model, trained, optimizer, tokens, case, args, mesh)
        except torch.OutOfMemoryError:
            yield [row(case, "sparselong", "out_of_memory", 1, "1")]
            if mesh.context_size > 1:  # other ranks wait in a collective: end this part
                raise
            break


def measure_length(
    model: Any, trained: list, optimizer: Any, tokens: int, case: dict, args: Any, mesh: Any
) -> Rows:
    """Return rows of steps at one length: the slowest rank's time, the most bytes on any rank."""
    from sparselong.parallel.collectives import all_gather, count_bytes

    step = make_step(model, trained, optimizer, tokens, args.stride, mesh)
    seconds, loss = [], 0.0
    for n in range(2 + args.rounds):
        begin = time.perf_counter()
        loss = float(step())
        torch.cuda.synchronize()
        if n == 1:
            torch.cuda.reset_peak_memory_stats()
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_reserved()
    with count_bytes() as sent:
        step()
    attention = sum(n for tag, n in sent.items() if tag.startswith(("key", "halo")))
    mine = torch.tensor([statistics.median(seconds[2:]), attention, peak], dtype=torch.float64)
    everyone = torch.stack([t.cpu() for t in all_gather(mine, mesh.context_group, "")])
    second, attention, peak = (float(x) for x in everyone.amax(0))
    tell(
        f"P={mesh.context_size} peer={args.peer} {case['arm']} {tokens} tokens: {second:.3f} s, "
        f"{tokens / second:,.0f} tokens/s, {peak / 2**30:.1f} GiB, attention sends "
        f"{attention / 1e6:.0f} MB, all {sum(sent.values()) / 1e6:.0f}; loss {loss:.4f}"
    )
    rows = [
        row(case, "sparselong", "step_seconds", second, "s"),
        row(case, "sparselong", "throughput", tokens / second, "tokens/s"),
        row(case, "sparselong", "attention_sent_bytes", attention, "bytes"),
        row(case, "sparselong", "reserved_bytes", peak, "bytes"),
        row(case, "sparselong", "loss", loss, "nats"),
    ]
    return rows + (profile_rank_0(step, case) if tokens in args.profiled else [])


def make_step(
    model: Any, trained: list, optimizer: Any, tokens: int, stride: int, mesh: Any
) -> Callable[[], torch.Tensor]:
    """Return a function that makes one optimizer step on random tokens and returns the loss."""
    from sparselong.parallel.apply import share_batch
    from sparselong.parallel.gradients import reduce_gradients
    from sparselong.parallel.loss import add_losses, count_step
    from sparselong.runtime.settings import using

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(200_000, (1, tokens), generator=generator).cuda()

    def step() -> torch.Tensor:
        batch = {"input_ids": ids, "labels": ids}
        count = count_step([batch], mesh, tokens).divisor
        local, changes = share_batch(batch, mesh, stride)
        with using(**changes):
            loss = model(**local, num_items_in_batch=count, use_cache=False).loss
            loss.backward()
        reduce_gradients(trained, mesh)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return add_losses(loss, mesh)

    return step


def profile_rank_0(step: Callable[[], torch.Tensor], case: dict) -> Rows:
    """Make a step on every rank, profiled on rank 0; return rows of its kernel time by kind."""
    from benchmarks.train_step import profile_step

    if dist.get_rank() > 0:
        step()
        return []
    profiled = profile_step(step, case, "sparselong")
    rows = [r for r in profiled if r["metric"].startswith("profile_ms")]
    for r in rows:
        tell(f"    {r['metric']}: {r['value']:.1f} ms")
    return rows


def tell(text: str) -> None:
    """Print a line of progress on rank 0."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def work(args: argparse.Namespace) -> None:
    """Run one part on this rank."""
    from sparselong.parallel.mesh import build_mesh

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=args.timeout_seconds)
    dist.init_process_group("nccl", timeout=timeout)
    mesh = build_mesh(dist.get_world_size(), timeout)
    rows: Rows = []
    if "attention" in args.parts and mesh.context_size > 1:
        keep(measure_attention(args, mesh), rows, args)
    if "steps" in args.parts:
        for arm in args.arms:
            for found in measure_steps(arm, args, mesh):
                keep(found, rows, args)
            gc.collect()
            torch.cuda.empty_cache()
    dist.destroy_process_group()


def keep(found: Rows, rows: Rows, args: argparse.Namespace) -> None:
    """Add rows to a part's, and write them at once, so that a later failure does not lose them."""
    rows += found
    if dist.get_rank() == 0:
        write_atomically(Path(args.out), json.dumps(rows))


def parse() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--degrees", nargs="+", type=int, default=[4, 2, 1])
    parser.add_argument("--parts", nargs="+", default=["attention", "steps"])
    parser.add_argument(
        "--no-peer", action="store_true", help="also the largest degree without P2P"
    )
    parser.add_argument("--attention-tokens", type=int, default=16_384)
    parser.add_argument("--strides", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--stride", type=int, default=4, help="heads_k_stride of steps")
    parser.add_argument("--arms", nargs="+", default=["lora", "masked"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16_384])
    parser.add_argument("--least", type=int, default=4096, help="fewest tokens per GPU")
    parser.add_argument("--profiled", nargs="*", type=int, default=[16_384])
    parser.add_argument("--layers", type=int, default=24, help="24 is the 20b")
    parser.add_argument("--keep-experts", default="never", choices=("always", "never"))
    parser.add_argument("--rounds", type=int, default=3, help="measured steps")
    parser.add_argument("--timeout-seconds", type=int, default=300, help="timeout of each part")
    add_result(parser)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run all parts and write the results."""
    args = parse()
    args.peer = True
    if args.settings:
        work(argparse.Namespace(**json.loads(args.settings)))
        return
    gpus = torch.cuda.device_count()
    if gpus < 2:
        print("benchmarks/context_parallel.py needs two CUDA devices or more: nothing measured")
        return
    command = command_of(__file__, args)
    machine = args.machine or f"{machine_of(args)}x{gpus}"
    turns = [(degree, True) for degree in args.degrees if degree <= gpus]
    turns += [(max(args.degrees), False)] if args.no_peer else []
    rows: Rows = []
    failed = []
    for wave in make_waves(turns, gpus):
        for turn, found, ended in run_wave(wave, args, __file__):
            rows += found
            failed += [] if ended else [turn]
        path = write("context_parallel", machine, command, rows, args.folder)
        print(path, file=sys.stderr)
    if failed:
        sys.exit(f"(GPUs, peer access) that failed: {failed}")


if __name__ == "__main__":
    main()
