#!/usr/bin/env python3
"""Attention in gpt-oss's shape: every backend, full and window layers, one document and packed.

Measures for each case the time of the forward pass and of forward and backward, TFLOP/s for the
FLOPs that the mask leaves (the backward pass counts 5 / 2 of the forward), GB/s for the bytes that
must move (each input read once, each output written once), and peak memory. The backends of a case
are timed alternately, so that thermal throttling affects all of them. The error against fp64 is
measured first. No speed is reported for a backend of ours whose error exceeds twice that of torch's
FlashAttention-2 with the sink correction, or for any other backend whose error exceeds twice that
of eager attention, which is plain torch in the same dtype.

Also measured: one query over a long cache, the cost of deterministic=True, and first calls
(`attention_first_call.py`); `--cases-only` leaves these out. flex runs last because it compiles for
every length; all other results are written before. A backend that is not installed, or not made for
this GPU, is recorded as not measured, with the reason. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.attention_cases import (
    HEAD_DIM,
    HEADS,
    OURS,
    WINDOW,
    Run,
    count_bytes,
    count_pairs,
    draw,
    kind_of,
    make_runs,
    pack,
    refuse,
    skips,
)
from benchmarks.attention_first_call import measure_first_calls
from benchmarks.command_line import add_result, command_of, has_device, machine_of
from benchmarks.record import row, write
from sparselong.kernels.attention.op import attention
from sparselong.runtime import using
from tests.references.attention import attention_reference

Rows = list[dict]
KINDS = {"full": None, "window": WINDOW}
K = TypeVar("K")


def time_in_turn(calls: Mapping[K, Callable[[], object]]) -> dict[K, float]:
    """Return the median device time of each call in ms. The first round is a warm-up.

    Every round makes each call once. Before each, writing a GiB four times flushes the L2 cache and
    lets the host run a millisecond ahead of the device, as within a model. The result is therefore
    the device's time, without the host's launch overhead.
    """
    flush = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    times: dict[K, list[float]] = {name: [] for name in calls}
    started = time.monotonic()
    for n in range(41):
        for name, call in calls.items():
            for _ in range(4):
                flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
        if n >= 5 and time.monotonic() - started > 0.3 * len(calls):
            break
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def measure_errors(runs: dict[str, Run]) -> tuple[Rows, set[str]]:
    """Return rows of relative L2 errors against fp64 at 2,048 tokens, and the failing backends."""
    rows, failed = [], set()
    for window in (None, WINDOW):
        leaves = draw(2048)
        exact = [t.detach().double().requires_grad_() for t in leaves[:4]]
        out = attention_reference(*exact, window=window)[0]
        expected = [out, *torch.autograd.grad(out, exact, leaves[4].double())]
        errors = {}
        for name, run in {**make_runs(["torch_flash", "eager"]), **runs}.items():
            if skips(name, window, False, 2048):
                continue
            out = run(*leaves[:4], window)
            got = [out, *torch.autograd.grad(out, leaves[:4], leaves[4])]
            pairs = zip((g.double() for g in got), expected, strict=True)
            errors[name] = [float((g - e).detach().norm() / e.detach().norm()) for g, e in pairs]
        case = {"kind": kind_of(window), "tokens": 2048, "packed": False}
        for name, values in errors.items():
            for what, value in zip(("out", "dq", "dk", "dv", "dsinks"), values, strict=True):
                rows.append(row(case, name, f"relative_error_{what}", value, "1"))
            yardstick = "eager" if name in ("eager", "flex") else "torch_flash"
            limits = [2 * value for value in errors[yardstick]]
            if any(v > limit for v, limit in zip(values, limits, strict=True)):
                failed.add(name)
                tell(f"{name} {kind_of(window)}: errors {values}, allowed {limits}: no speed shown")
    return rows, failed


def measure_speed(runs: dict[str, Run], tokens: int, window: int | None, packed: bool) -> Rows:
    """Return the rows of one case for the given backends."""
    leaves = draw(tokens)
    leaves[3].requires_grad_(False)  # sinks are frozen, as under LoRA
    cu_seqlens = pack(tokens) if packed else None
    flops = 4 * HEAD_DIM * HEADS * count_pairs(tokens, window, cu_seqlens)
    case = {"kind": kind_of(window), "tokens": tokens, "packed": packed}

    def forward(run: Run) -> torch.Tensor:
        return run(*leaves[:4], window, cu_seqlens)

    def forward_backward(run: Run) -> object:
        return torch.autograd.grad(forward(run), leaves[:3], leaves[4])

    rows: Rows = []
    for function, factor in ((forward, 1.0), (forward_backward, 3.5)):
        calls = {name: functools.partial(function, run) for name, run in runs.items()}
        what = function.__name__
        peaks = {name: measure_peak(call) for name, call in calls.items()}
        taken = time_in_turn(calls)
        moved = count_bytes(tokens, function is forward_backward)
        for name, ms in taken.items():
            rows += [
                row(case, name, f"{what}_ms", ms, "ms"),
                row(case, name, f"{what}_rate", flops * factor / ms / 1e9, "TFLOP/s"),
                row(case, name, f"{what}_bandwidth", moved / ms / 1e6, "GB/s"),
                row(case, name, f"{what}_peak_bytes", peaks[name], "bytes"),
            ]
        label = f"{kind_of(window):6} {'packed' if packed else 'one':6} {tokens:6} {what:16}"
        tell(label + "  ".join(f"{name} {ms:.3f}" for name, ms in taken.items()))
    return rows


def measure_peak(call: Callable[[], object]) -> int:
    """Return the peak of bytes allocated during the call, minus those allocated before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def measure_decode(names: list[str], keys: int, window: int | None) -> Rows:
    """Return rows of few queries over a long cache: device time, and wall time per call."""
    rows: Rows = []
    q, k, v, sinks, _ = (t.detach() for t in draw(keys))
    for queries in (1, 8):
        case = {"kind": kind_of(window), "tokens": keys, "packed": False, "queries": queries}

        step = functools.partial(
            attention, q[:, :, -queries:], k, v, sinks, window=window, query_offset=keys - queries
        )
        calls = {
            name: functools.partial(step, backend=None if name == "chosen" else name)
            for name in names
        }
        for name, ms in time_in_turn(calls).items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(50):
                calls[name]()
            torch.cuda.synchronize()
            wall_ms = (time.perf_counter() - started) * 20
            rows.append(row(case, name, "forward_ms", ms, "ms"))
            rows.append(row(case, name, "forward_wall_ms", wall_ms, "ms"))
            tell(f"{case['kind']:6} {keys:6} {queries} queries {name:12} {ms:.4f} ms, "
                 f"back to back {wall_ms:.4f}")  # fmt: skip
    return rows


def measure_determinism(tokens: int) -> Rows:
    """Return rows of FlashAttention-2 and -4, forward + backward, deterministic and not."""
    *leaves, dout = draw(tokens)
    leaves[3].requires_grad_(False)

    def both(name: str, window: int | None, asked: bool) -> object:
        with using(deterministic=asked):
            out, _ = attention(*leaves, window=window, backend=name)
        return torch.autograd.grad(out, leaves[:3], dout)

    rows: Rows = []
    for window in (None, WINDOW):
        calls = {
            (name, asked): functools.partial(both, name, window, asked)
            for name in ("torch_flash", "flash_attn", "flash_attn_4")
            for asked in (False, True)
            if not skips(name, window, False, tokens)
        }
        for (name, asked), ms in time_in_turn(calls).items():
            case = {"kind": kind_of(window), "tokens": tokens, "deterministic": asked}
            rows.append(row(case, name, "forward_backward_ms", ms, "ms"))
            tell(f"{name} deterministic={asked} {kind_of(window)}: {ms:.3f} ms")
    return rows


def list_absent(names: Iterable[str]) -> Rows:
    """Return a row for each backend that cannot be measured here, with the reason."""
    reasons = {name: refuse(name) for name in names}
    return [
        row({"reason": reason}, name, "not_measured", 1, "1")
        for name, reason in reasons.items()
        if reason is not None
    ]


def measure_cases(
    runs: dict[str, Run], lengths: list[int], windows: Sequence[int | None] = (None, WINDOW)
) -> Rows:
    """Return rows of errors, and of speed for the backends whose errors are within the limits."""
    rows, failed = measure_errors(runs)
    rows = [r for r in rows if r["backend"] in runs]
    for window, packed, tokens in itertools.product(windows, (False, True), lengths):
        able = {
            name: run
            for name, run in runs.items()
            if name not in failed and not skips(name, window, packed, tokens)
        }
        if able:
            rows += measure_speed(able, tokens, window, packed)
    return rows


def measure_others(names: list[str]) -> Rows:
    """Return rows of decoding, determinism and first calls."""
    few = [name for name in names if name in ("triton", "torch_flash", "flash_attn", "chosen")]
    few = [name for name in few if not skips(name, None, False, 1)]
    rows = measure_decode(few, 16384, None) + measure_decode(few, 16384, WINDOW)
    return rows + measure_determinism(16384) + measure_first_calls()


def tell(line: str) -> None:
    """Print a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Measure the chosen backends and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--backends",
        nargs="+",
        default=[*OURS, "chosen", "eager"],
        choices=(*OURS, "chosen", "eager", "flex"),
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[4096, 8192, 16384, 32768, 65536, 131072]
    )
    parser.add_argument("--kinds", nargs="+", default=["full", "window"], choices=KINDS)
    parser.add_argument("--cases-only", action="store_true", help="errors and speed of the cases")
    add_result(parser)
    args = parser.parse_args()
    if not has_device(__file__):
        return
    machine, command = machine_of(args), command_of(__file__, args)
    rows = list_absent(args.backends)
    windows = [KINDS[kind] for kind in args.kinds]
    for names in ([n for n in args.backends if n != "flex"], ["flex"]):
        runs = make_runs([n for n in names if n in args.backends])
        if runs:
            rows += measure_cases(runs, args.tokens, windows)
        if runs and names != ["flex"] and not args.cases_only:
            rows += measure_others(list(runs))
        print(write("attention", machine, command, rows, args.folder))


if __name__ == "__main__":
    main()
