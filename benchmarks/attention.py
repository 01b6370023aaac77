#!/usr/bin/env python3
"""Attention in gpt-oss's shape: every backend, full and window layers, one document and packed.

For each case the time of the forward pass and of forward and backward, TFLOP/s on the FLOPs that
the mask leaves (5 / 2 of the forward's again for the backward), GB/s on the bytes that must move
(each input read once, each output written once), and peak memory. Each backend's error against
fp64 is measured first, and one that errs more than twice as much as torch's FlashAttention-2 with
the sink correction is left out of the speed table. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.record import RESULTS, row, write
from sparselong.kernels.attention import attention
from sparselong.kernels.attention_ref import attention_reference

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 64, 8, 64, 128
MEAN_DOCUMENT = 1024
OURS = ("triton", "torch_flash", "torch_cudnn", "flash_attn")
Run = Callable[..., torch.Tensor]


def eager(q, k, v, sinks, window=None, cu_seqlens=None) -> torch.Tensor:
    """What transformers' eager gpt-oss computes, in the inputs' dtype."""
    tokens, group = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    at = torch.arange(tokens, device=q.device)
    seen = at <= at[:, None]
    if window is not None:
        seen &= at > at[:, None] - window
    scores = scores.masked_fill(~seen, torch.finfo(q.dtype).min)
    logits = torch.cat([scores, sinks.to(q.dtype).view(1, -1, 1, 1).expand(*q.shape[:3], 1)], -1)
    logits = logits - logits.max(-1, keepdim=True).values
    return torch.softmax(logits, -1, dtype=logits.dtype)[..., :-1] @ v


def make_flex() -> Run:
    """torch's flex_attention, compiled, with the sinks taken in through its lse."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks = {}

    def run(q, k, v, sinks, window=None, cu_seqlens=None) -> torch.Tensor:
        tokens = q.shape[2]
        if (tokens, window) not in masks:

            def seen(batch, head, query, key):
                causal = query >= key
                return causal if window is None else causal & (query - key < window)

            masks[tokens, window] = create_block_mask(seen, None, None, tokens, tokens, q.device)
        mask = masks[tokens, window]
        out, lse = compiled(q, k, v, block_mask=mask, enable_gqa=True, return_lse=True)
        return (out * torch.sigmoid(lse - sinks[:, None])[..., None]).to(q.dtype)

    return run


def make_runs(names: list[str]) -> dict[str, Run]:
    """The named backends as functions (q, k, v, sinks, window, cu_seqlens) → out."""

    def ours(name: str) -> Run:
        return lambda q, k, v, sinks, window=None, cu_seqlens=None: attention(
            q, k, v, sinks, window=window, cu_seqlens=cu_seqlens, backend=name
        )[0]

    known = {name: ours(name) for name in OURS} | {"chosen": ours(None)}
    known["eager"] = eager
    if "flex" in names:
        known["flex"] = make_flex()
    return {name: known[name] for name in names}


def draw(tokens: int) -> list[torch.Tensor]:
    """q, k, v, sinks with gradients, and dout, as a model's projections lay them out."""
    torch.manual_seed(tokens)

    def tensor(heads: int) -> torch.Tensor:
        wide = torch.randn(1, tokens, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        return wide.transpose(1, 2)

    leaves = [tensor(HEADS), tensor(KV_HEADS), tensor(KV_HEADS), torch.randn(HEADS, device="cuda")]
    return [t.requires_grad_() for t in leaves] + [tensor(HEADS)]


def pack(tokens: int) -> torch.Tensor:
    """Boundaries of documents whose lengths are uniform around MEAN_DOCUMENT."""
    generator = torch.Generator().manual_seed(0)
    bounds = [0]
    while bounds[-1] < tokens:
        length = int(torch.randint(1, 2 * MEAN_DOCUMENT, (), generator=generator))
        bounds.append(min(tokens, bounds[-1] + length))
    return torch.tensor(bounds, dtype=torch.int32, device="cuda")


def count_pairs(tokens: int, window: int | None, cu_seqlens: torch.Tensor | None) -> int:
    """(query, key) pairs that the mask leaves, per head."""
    bounds = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    total = 0
    for start, end in zip(bounds, bounds[1:], strict=False):
        length, reach = end - start, min(window or end, end - start)
        total += reach * (reach + 1) // 2 + (length - reach) * reach
    return total


def count_bytes(tokens: int, backward: bool) -> int:
    """Bytes that must move: q, k, v, out, and for the backward these again, dout, dq, dk, dv."""
    q, kv = tokens * HEADS * HEAD_DIM * 2, tokens * KV_HEADS * HEAD_DIM * 2
    forward = 2 * q + 2 * kv
    return forward + (4 * q + 4 * kv if backward else 0)


def time_ms(call: Callable[[], object]) -> float:
    """Median of at least three runs after two, by device events; a fresh L2 for each."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    call()
    times: list[float] = []
    for n in range(40):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if n:
            times.append(begin.elapsed_time(end))
        if n >= 3 and sum(times) > 250:
            break
    return statistics.median(times)


def measure_errors(runs: dict[str, Run]) -> tuple[list[dict], set[str]]:
    """Rows of relative L2 errors against fp64 at 2,048 tokens, and the backends that fail."""
    rows, failed = [], set()
    for window in (None, WINDOW):
        leaves = draw(2048)
        exact = [t.detach().double().requires_grad_() for t in leaves[:4]]
        out = attention_reference(*exact, window=window)[0]
        expected = [out, *torch.autograd.grad(out, exact, leaves[4].double())]
        errors = {}
        for name, run in {"torch_flash": make_runs(["torch_flash"])["torch_flash"], **runs}.items():
            if skips(name, window, False, 2048):
                continue
            out = run(*leaves[:4], window)
            got = [out, *torch.autograd.grad(out, leaves[:4], leaves[4])]
            pairs = zip((g.double() for g in got), expected, strict=True)
            errors[name] = [float((g - e).detach().norm() / e.detach().norm()) for g, e in pairs]
        for name, values in errors.items():
            case = {"kind": kind_of(window), "tokens": 2048, "packed": False}
            for what, value in zip(("out", "dq", "dk", "dv", "dsinks"), values, strict=True):
                rows.append(row(case, name, f"relative_error_{what}", value, "1"))
            limits = [2 * value for value in errors["torch_flash"]]
            if any(v > limit for v, limit in zip(values, limits, strict=True)):
                failed.add(name)
                print(
                    f"{name} {kind_of(window)}: errors {values}, allowed {limits}", file=sys.stderr
                )
    return rows, failed


def kind_of(window: int | None) -> str:
    return "full" if window is None else "window"


def skips(name: str, window: int | None, packed: bool, tokens: int) -> bool:
    """Whether a backend cannot take a case: what it does not offer, or memory."""
    if name == "torch_cudnn":
        return window is not None or packed
    if name == "eager":
        return packed or tokens > 8192
    return name == "flex" and packed


def measure_speed(run: Run, name: str, tokens: int, window: int | None, packed: bool) -> list[dict]:
    """Rows of one backend on one case."""
    leaves = draw(tokens)
    cu_seqlens = pack(tokens) if packed else None
    flops = 4 * HEAD_DIM * HEADS * count_pairs(tokens, window, cu_seqlens)
    case = {"kind": kind_of(window), "tokens": tokens, "packed": packed}

    def forward() -> object:
        with torch.no_grad():
            return run(*leaves[:4], window, cu_seqlens)

    def both() -> object:
        out = run(*leaves[:4], window, cu_seqlens)
        return torch.autograd.grad(out, leaves[:3], leaves[4])  # as under LoRA: sinks are frozen

    leaves[3].requires_grad_(False)
    rows = []
    for what, call, factor in (("forward", forward, 1.0), ("forward_backward", both, 3.5)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        peak = torch.cuda.max_memory_allocated() - before
        ms = time_ms(call)
        moved = count_bytes(tokens, what != "forward")
        rows += [
            row(case, name, f"{what}_ms", ms, "ms"),
            row(case, name, f"{what}_rate", flops * factor / ms / 1e9, "TFLOP/s"),
            row(case, name, f"{what}_bandwidth", moved / ms / 1e6, "GB/s"),
            row(case, name, f"{what}_peak_bytes", peak, "bytes"),
        ]
    print(
        f"{kind_of(window):6} {'packed' if packed else 'one':6} {tokens:6} {name:12} "
        f"forward {rows[0]['value']:8.3f} ms  both {rows[4]['value']:8.3f} ms "
        f"{rows[5]['value']:6.1f} TFLOP/s",
        file=sys.stderr,
        flush=True,
    )
    return rows


def measure_decode(name: str, keys: int, window: int | None) -> list[dict]:
    """Rows of one query against a long cache; for what goes through the public function."""
    q, k, v, sinks, _ = (t.detach() for t in draw(keys))
    query = q[:, :, -1:]

    def step() -> object:
        return attention(
            query, k, v, sinks, window=window, query_offset=keys - 1,
            backend=None if name == "chosen" else name,
        )  # fmt: skip

    case = {"kind": kind_of(window), "tokens": keys, "packed": False, "queries": 1}
    ms = time_ms(step)
    print(f"{kind_of(window):6} decode {keys:6} {name:12} {ms:8.3f} ms", file=sys.stderr)
    return [row(case, name, "forward_ms", ms, "ms")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["triton", "torch_flash", "torch_cudnn", "chosen", "eager"],
        choices=(*OURS, "chosen", "eager", "flex"),
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[4096, 8192, 16384, 32768, 65536, 131072]
    )
    parser.add_argument("--machine", help="short name for the result's file, for example h200")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():  # make bench goes on with what this machine can measure
        print("benchmarks/attention.py needs a CUDA device: nothing measured")
        return
    runs = make_runs(args.backends)
    rows, failed = measure_errors(runs)
    for window in (None, WINDOW):
        for packed in (False, True):
            for tokens in args.tokens:
                for name, run in runs.items():
                    if name not in failed and not skips(name, window, packed, tokens):
                        rows += measure_speed(run, name, tokens, window, packed)
        for name in runs:
            if name in (*OURS, "chosen") and name != "torch_cudnn":
                rows += measure_decode(name, 16384, window)
    machine = args.machine or torch.cuda.get_device_name().split()[-1].lower()
    command = (
        f"python3 benchmarks/attention.py --backends {' '.join(args.backends)} "
        f"--tokens {' '.join(map(str, args.tokens))}"
    )
    print(write("attention", machine, command, rows, args.folder))


if __name__ == "__main__":
    main()
