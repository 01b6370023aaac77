#!/usr/bin/env python3
"""Time, memory and kernels of a training step in gpt-oss-20b's shape.

A step is forward, backward and optimizer. Weights are random and made on the GPU; shapes, formats,
kernels and optimizer are those of training. Every arm runs in its own process on the same tokens:

| arm    | attention      | experts          | adapter                                             |
|--------|----------------|------------------|-----------------------------------------------------|
| eager  | transformers   | bf16, grouped_mm | PEFT LoRA on bf16 attention: the usual setup        |
| flex   | transformers   | bf16, grouped_mm | the same with flex_attention                        |
| lora   | this project's | MXFP4, packed    | PEFT LoRA on bf16 attention                         |
| masked | this project's | MXFP4, packed    | masked LoRA through 2:4 int4 attention, as stage 03 |

`device_bytes` is the GPU memory of the process: torch's peak reserved memory and the CUDA context.
With `--cap-gib`, torch may reserve only what the cap leaves after the context. With `--planned`,
layers compute and keep what stage 03's planner decides for a GPU of that memory: slices of rows,
inputs in host memory, attention's backend. `--placement host` keeps experts in page-locked host
memory. The profile sums the kernels of one step by kind. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.command_line import add_result, command_of, has_device, machine_of
from benchmarks.host_copies import host_memory
from benchmarks.memory import kept_in, predict, settle
from benchmarks.record import row, write
from benchmarks.shape_20b import BASELINES, OURS, R, build, compute_layers
from sparselong.memory import Kept
from sparselong.model import find_host_experts
from sparselong.model.host_experts import HostExperts
from sparselong.runtime import using

KINDS = {
    "communication": ("nccl",),
    "attention": ("flash", "fmha", "cudnn_generated", "flex_attention", "forward_kernel",
                  "dq_kernel", "dkdv_kernel", "sdpa"),
    "expert products": ("grouped", "packed_kernel", "dense_kernel", "decode_kernel", "16Gr"),
    "dense products": ("gemm", "nvjet", "cutlass", "cublas", "splitK", "xmma"),
}  # fmt: skip
"""Substrings of kernel names by kind, tried in this order; other kernels count as elementwise."""


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel, from its name."""
    for kind, parts in KINDS.items():
        if any(part.lower() in kernel.lower() for part in parts):
            return kind
    return "elementwise, copies, reductions"


def profile_step(step, case: dict[str, Any], arm: str) -> list[dict[str, Any]]:
    """Return rows of one step's kernel time by kind, and of its longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    by_kernel: dict[str, float] = defaultdict(float)
    for event in trace.key_averages():
        by_kernel[event.key] += event.self_device_time_total / 1e3
    by_kind: dict[str, float] = defaultdict(float)
    for kernel, ms in by_kernel.items():
        by_kind[kind_of(kernel)] += ms
    rows = [row(case, arm, f"profile_ms: {kind}", ms, "ms") for kind, ms in by_kind.items()]
    longest = sorted(by_kernel.items(), key=lambda item: -item[1])[:30]
    for kernel, ms in longest:
        print(f"  {ms:9.2f} ms  {kind_of(kernel):32} {kernel[:110]}", file=sys.stderr)
    return rows + [row(case, arm, f"kernel_ms: {k[:160]}", ms, "ms") for k, ms in longest]


def context_bytes() -> int:
    """Return device memory in use that torch has not reserved: CUDA context and libraries."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one arm at one length in this process and return its rows."""
    torch.manual_seed(0)
    torch.zeros(1, device="cuda")
    at_rest = context_bytes()  # includes other processes' memory: there must be none
    if args.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((args.cap_gib * 2**30 - args.spare) / total)
    with using(expert_placement=args.placement):
        kept = kept_in(describe(args, args.tokens))
        model = build(args.arm, kept.attention, args.layers, args.rank, keep_experts=kept.experts)
    host = find_host_experts(model)
    torch.cuda.empty_cache()  # of what was allocated to draw the weights
    vocab: Any = model.config.vocab_size  # type: ignore[union-attr]
    tokens = torch.randint(vocab, (args.batch, args.tokens), device="cuda")
    compute_in_slices(model, args, kept)
    step = make_step(model, tokens, args.attention_backend)
    case = describe(args, args.tokens)
    seconds, loss, copied = time_steps(step, args, host)
    median, context = statistics.median(seconds[args.warm_up :]), context_bytes()
    sizes = {
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "device_bytes": torch.cuda.max_memory_reserved() + context,
        "context_bytes": context,
        "copied_bytes": copied,
        **host_memory(host),
    }
    rate = args.batch * args.tokens / median
    shown = {name: f"{size / 2**30:.2f}" for name, size in sizes.items()}
    print(
        f"{args.arm:7} {args.tokens:6} x {args.batch}: {median:7.3f} s, {rate:8.0f} tok/s, GiB "
        f"{shown}, at rest {at_rest / 2**30:.2f}; first step {seconds[0]:.1f} s, loss {loss:.3f}",
        file=sys.stderr,
    )
    rows = [
        row(case, args.arm, "step_seconds", median, "s"),
        row(case, args.arm, "throughput", rate, "tokens/s"),
        row(case, args.arm, "first_step_seconds", seconds[0], "s"),
        row(case, args.arm, "loss", loss, "nats"),
        *(row(case, args.arm, name, size, "bytes") for name, size in sizes.items()),
    ]
    return rows + (profile_step(step, case, args.arm) if args.profile else [])


def time_steps(
    step: Callable[[], float], args: argparse.Namespace, host: HostExperts | None
) -> tuple[list[float], float, int]:
    """Return every step's seconds, and the last one's loss and bytes copied from host memory.

    Peaks of memory are those since the warm-up.
    """
    seconds, loss, copied = [], 0.0, 0
    for n in range(args.warm_up + args.rounds):
        before = host.copied_bytes if host else 0
        begin = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        copied = host.copied_bytes - before if host else 0
        if n + 1 == args.warm_up:
            torch.cuda.reset_peak_memory_stats()
    return seconds, loss, copied


def compute_in_slices(model: Any, args: argparse.Namespace, kept: Kept) -> None:
    """Let layers compute in slices, or keep their inputs in host memory, as stage 03 does."""
    if args.slice_rows == "never" and not args.offload:
        return
    rows = args.batch * args.tokens if args.slice_rows == "never" else int(args.slice_rows)
    compute_layers(model.get_base_model(), kept, rows, offloads=args.offload)


def make_step(model: Any, tokens: torch.Tensor, backend: str = "auto") -> Callable[[], float]:
    """Return a function that makes one optimizer step on `tokens` and returns the loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> float:
        with using(attention_backend=backend):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def describe(args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Return the case of a row."""
    names = ("batch", "layers", "rank", "cap_gib", "keep_attention", "keep_experts")
    names += ("offload", "slice_rows", "placement", "attention_backend")
    return {"tokens": tokens} | {name: getattr(args, name) for name in names}


def spawn(arm: str, tokens: int, args: argparse.Namespace, profiled: bool) -> list[dict[str, Any]]:
    """Measure one arm in a new process; return its rows, or one that records out of memory."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--arm", arm, "--tokens", str(tokens), "--out", out]
        command += ["--batch", args.batch, "--layers", args.layers, "--rank", args.rank]
        command += ["--spare", args.spare]
        command += ["--keep-attention", args.keep_attention]
        command += ["--keep-experts", args.keep_experts]
        command += ["--cap-gib", args.cap_gib] if args.cap_gib else []
        command += ["--profile"] if profiled else []
        command += ["--slice-rows", args.slice_rows]
        command += ["--offload"] if args.offload else []
        command += ["--placement", args.placement, "--attention-backend", args.attention_backend]
        command += ["--warm-up", args.warm_up, "--rounds", args.rounds]
        done = subprocess.run(list(map(str, command)), stderr=subprocess.PIPE, text=True)
        print(done.stderr[-6000:], file=sys.stderr, end="", flush=True)
        if done.returncode == 0:
            return json.loads(out.read_text(encoding="utf-8"))
    if "OutOfMemoryError" not in done.stderr:
        sys.exit(f"{arm} at {tokens} tokens failed")
    return [row(describe(args, tokens), arm, "out_of_memory", 1, "1")]


def parse() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    arms = (*BASELINES, *OURS)
    parser.add_argument("--arms", nargs="+", default=list(arms), choices=arms)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192, 16384])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=24, help="24 is the 20b")
    parser.add_argument("--rank", type=int, default=R, help="of the adapters")
    parser.add_argument("--cap-gib", type=float, help="limit of the whole process")
    parser.add_argument("--spare", type=int, default=700 << 20, help="bytes for the context")
    parser.add_argument("--keep-attention", default="always", choices=("always", "never"))
    parser.add_argument(
        "--keep-experts",
        help="always, never (the default), a number of layers, or with --planned auto (the default "
        "there)",
    )
    parser.add_argument(
        "--slice-rows", default="never", help="tokens of a slice; arms of ours only"
    )
    parser.add_argument("--offload", action="store_true", help="inputs of layers on the host")
    parser.add_argument("--attention-backend", default="auto", help="of arms of ours")
    parser.add_argument("--placement", default="gpu", choices=("gpu", "host"), help="of experts")
    parser.add_argument("--planned", action="store_true", help="with --cap-gib, arm masked only")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before those measured")
    parser.add_argument("--rounds", type=int, default=3, help="measured steps")
    parser.add_argument("--profiled", type=int, nargs="*", default=[16384], help="lengths")
    parser.add_argument("--subject", default="train_step", help="first part of the file name")
    add_result(parser)
    for name in ("--arm", "--tokens", "--out"):  # for the process of one measurement
        parser.add_argument(name, type=int if name == "--tokens" else str, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    measured = {args.arm} if args.arm else set(args.arms)
    slices = args.slice_rows != "never" or args.offload
    args.keep_experts = read_keep_experts(parser, args)
    if slices and args.keep_experts not in ("never", 0):
        parser.error("--slice-rows and --offload need --keep-experts never")
    if (slices or args.placement == "host") and measured & set(BASELINES):
        parser.error("--slice-rows, --offload and --placement host need arms of ours")
    if args.planned and (args.cap_gib is None or measured != {"masked"}):
        parser.error("--planned needs --cap-gib, and --arms masked")
    return args


def read_keep_experts(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str | int:
    """Return `--keep-experts`, a number as such; the planner decides under `auto`."""
    asked = args.keep_experts or ("auto" if args.planned else "never")
    allowed = ("auto", "always", "never") if args.planned else ("always", "never")
    if asked in allowed:
        return asked
    if args.planned or not asked.isdecimal() or int(asked) > args.layers:
        numbers = "" if args.planned else f", 0 to {args.layers}"
        parser.error(f"--keep-experts {asked}: allowed here: {', '.join(allowed)}{numbers}")
    return int(asked)


def planned(args: argparse.Namespace, tokens: int) -> tuple[argparse.Namespace, list[Any]]:
    """Return the arguments as the planner decides for a length, and rows of what it predicts."""
    if not args.planned:
        return args, []
    settled = settle(describe(args, tokens), int(args.cap_gib * 2**30))
    args = argparse.Namespace(**vars(args) | settled)
    case = describe(args, tokens)
    return args, [row(case, "masked", "planned_bytes", predict(case).peak_bytes, "bytes")]


def main() -> None:
    """Measure the chosen arms and lengths, and write the results."""
    args = parse()
    if not has_device(__file__):
        return
    if args.arm:
        Path(args.out).write_text(json.dumps(measure(args)), encoding="utf-8")
        return
    rows = []
    machine = machine_of(args)
    command = command_of(__file__, args)
    for tokens in args.lengths:
        for arm in args.arms:
            settled, predicted = planned(args, tokens)
            rows += spawn(arm, tokens, settled, tokens in args.profiled) + predicted
            path = write(args.subject, machine, command, rows, args.folder)  # in case one fails
            print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
