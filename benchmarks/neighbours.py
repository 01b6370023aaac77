#!/usr/bin/env python3
"""Norms, rotary embedding and the loss in gpt-oss's shape.

Norm, residual sum + norm and rotary embedding of a sequence in bf16: ms, and GB/s for the bytes
that must move (each input read once, each output written once; the backward pass reads the upstream
gradients and writes those of the inputs), compared with transformers' computation in plain torch.
The loss over 201,088 vocabulary entries with its gradient: ms, TFLOP/s of its two products, and
peak memory in addition to inputs and gradient, compared with plain torch in chunks and with Liger
if installed. Every result is first compared with plain torch; no speed is reported if it differs.
Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn import functional
from torch.utils import checkpoint

from benchmarks.command_line import add_result, has_device, machine_of
from benchmarks.record import row, write
from sparselong.kernels.layer.cross_entropy import CHUNK_ROWS, linear_cross_entropy
from sparselong.kernels.layer.norm import add_rms_norm, rms_norm
from sparselong.kernels.layer.norm_torch import add_rms_norm_torch, rms_norm_torch
from sparselong.kernels.layer.rotary import rotate
from sparselong.kernels.layer.rotary_torch import rotate_torch

HIDDEN, VOCAB, HEADS, KV_HEADS, HEAD_DIM, EPS = 2880, 201_088, 64, 8, 64, 1e-5
TOLERANCE = 2e-2
"""Relative L2 difference allowed between bf16 results that differ only by rounding."""


def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
    """Return a random bf16 tensor."""
    return (torch.randn(size, device="cuda") * scale).bfloat16()


def time_ms(call: Callable[[], object]) -> float:
    """Return the median device time in ms after two warm-up calls, flushing L2 before each."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    times: list[float] = []
    for n in range(32):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if n >= 2:
            times.append(begin.elapsed_time(end))
        if n >= 5 and sum(times) > 400:
            break
    return statistics.median(times)


def differ(got: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> float:
    """Return the largest relative L2 difference between the results."""
    pairs = zip(got, wanted, strict=True)
    return max(float((g - w).float().norm() / w.float().norm()) for g, w in pairs)


Call = Callable[..., tuple[torch.Tensor, ...]]


def measure(
    name: str, inputs: list[torch.Tensor], upstream: list[torch.Tensor], backends: dict[str, Call]
) -> list[dict[str, Any]]:
    """Return rows of one operation: forward, and backward with the given upstream gradients."""
    leaves = [t.requires_grad_() for t in inputs]
    moved = {
        "forward": sum(t.nbytes for t in inputs + upstream),
        "backward": sum(t.nbytes for t in inputs + upstream),
    }
    if name != "rotary":  # the backward pass of a norm reads its input again
        moved["backward"] += upstream[0].nbytes
    rows, wanted = [], None
    for backend, call in backends.items():
        outputs = call(*leaves)
        grads = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
        results = tuple(t.detach() for t in (*outputs, *grads))
        wanted = wanted or results
        if not differ(results, wanted) < TOLERANCE:
            print(f"{name} {backend}: differs by {differ(results, wanted):.1e}", file=sys.stderr)
            continue

        def forward(call: Call = call) -> object:
            with torch.no_grad():
                return call(*leaves)

        def backward(outputs: tuple[torch.Tensor, ...] = outputs) -> object:
            return torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)

        for what, timed in (("forward", forward), ("backward", backward)):
            ms = time_ms(timed)
            case = {"operation": name, "pass": what, "tokens": leaves[0].shape[-2]}
            rate = moved[what] / ms / 1e6
            print(f"{name:14} {what:8} {backend:8} {ms:7.3f} ms {rate:6.0f} GB/s", file=sys.stderr)
            rows += [row(case, backend, "ms", ms, "ms"), row(case, backend, "rate", rate, "GB/s")]
    return rows


def measure_elementwise(tokens: int) -> list[dict[str, Any]]:
    """Return rows of norm, residual sum + norm and rotary: ours and plain torch."""
    x, residual, weight = draw(1, tokens, HIDDEN), draw(1, tokens, HIDDEN), draw(HIDDEN)
    upstream = [draw(1, tokens, HIDDEN) for _ in range(2)]
    rows = measure(
        "norm",
        [x],
        upstream[:1],
        {
            "torch": lambda x: (rms_norm_torch(x, weight, EPS),),
            "ours": lambda x: (rms_norm(x, weight, EPS),),
        },
    )
    rows += measure(
        "residual + norm",
        [x, residual],
        upstream,
        {
            "torch": lambda x, r: add_rms_norm_torch(x, r, weight, EPS),
            "ours": lambda x, r: add_rms_norm(x, r, weight, EPS),
        },
    )
    q, k, dq, dk = (draw(1, tokens, n, HEAD_DIM).transpose(1, 2) for n in (HEADS, KV_HEADS) * 2)
    angle = torch.rand(1, tokens, HEAD_DIM // 2, device="cuda") * 100
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    return rows + measure(
        "rotary",
        [q, k],
        [dq, dk],
        {
            "torch": lambda q, k: rotate_torch(q, k, cos, sin),
            "ours": lambda q, k: rotate(q, k, cos, sin),
        },
    )


def torch_chunks(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, rows: int = 512
) -> torch.Tensor:
    """Return the summed loss in plain torch, recomputing each chunk of logits in backward."""

    def piece(part: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(part, weight).float()
        return functional.cross_entropy(logits, wanted, reduction="sum")

    pieces = zip(hidden.split(rows), labels.split(rows), strict=True)
    return torch.stack(
        [checkpoint.checkpoint(piece, *p, use_reentrant=False) for p in pieces]  # pyright: ignore
    ).sum()


def loss_backends(chunks: list[int]) -> dict[str, Callable[..., torch.Tensor]]:
    """Return the backends as functions (hidden, weight, labels) → summed loss."""

    def ours(rows: int) -> Callable[..., torch.Tensor]:
        return lambda h, w, y: linear_cross_entropy(h, w, y, rows)

    found: dict[str, Callable[..., torch.Tensor]] = {"torch, chunks of 512": torch_chunks}
    found |= {f"ours, chunks of {rows}": ours(rows) for rows in chunks}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import functional as liger

        fused: Any = liger.liger_fused_linear_cross_entropy
        found["Liger"] = lambda h, w, y: fused(h, w, y, reduction="sum")
    return found


def measure_loss(tokens: int, supervised: float, chunks: list[int]) -> list[dict[str, Any]]:
    """Return rows of the loss and its gradient with respect to the hidden states."""
    hidden = draw(tokens, HIDDEN).requires_grad_()
    weight = draw(VOCAB, HIDDEN, scale=3 * HIDDEN**-0.5)
    labels = torch.randint(0, VOCAB, (tokens,), device="cuda")
    labels[torch.rand(tokens, device="cuda") >= supervised] = -100
    counted = int((labels != -100).sum())
    case = {"operation": "loss", "tokens": tokens, "supervised": supervised}
    rows, wanted = [], None
    for backend, call in loss_backends(chunks).items():

        def both(call: Callable[..., torch.Tensor] = call) -> tuple[torch.Tensor, ...]:
            loss = call(hidden, weight, labels)
            upstream = loss.new_tensor(1 / counted)
            return loss.detach(), *torch.autograd.grad(loss, hidden, upstream)

        results = both()
        wanted = wanted or results
        if not differ(results, wanted) < TOLERANCE:
            print(f"loss {backend}: differs by {differ(results, wanted):.1e}", file=sys.stderr)
            continue
        del results
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        peak = torch.cuda.max_memory_allocated() - before - hidden.nbytes
        ms = time_ms(both)
        rate = 4 * counted * VOCAB * HIDDEN / ms / 1e9
        print(
            f"loss {tokens} ({supervised:.0%}) {backend:22} {ms:8.2f} ms {rate:5.0f} TFLOP/s "
            f"{peak / 2**20:8,.0f} MiB",
            file=sys.stderr,
        )
        rows += [
            row(case, backend, "ms", ms, "ms"),
            row(case, backend, "rate", rate, "TFLOP/s"),
            row(case, backend, "peak_bytes", peak, "bytes"),
        ]
    return rows


def main() -> None:
    """Measure all operations and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--chunks", nargs="+", type=int, default=[CHUNK_ROWS])
    add_result(parser)
    args = parser.parse_args()
    if not has_device(__file__):
        return
    rows = measure_elementwise(args.tokens)
    for supervised in (1.0, 0.25):
        rows += measure_loss(args.tokens, supervised, args.chunks)
    machine = machine_of(args)
    command = (
        f"python3 benchmarks/neighbours.py --tokens {args.tokens} "
        f"--chunks {' '.join(map(str, args.chunks))}"
    )
    print(write("neighbours", machine, command, rows, args.folder))


if __name__ == "__main__":
    main()
