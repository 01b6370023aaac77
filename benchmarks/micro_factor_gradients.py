#!/usr/bin/env python3
"""Time variants of the gradients of LoRA factors on a CUDA device, and check them against fp64.

    PYTHONPATH=CHECKOUT python3 micro_fg.py                  every variant, both weights of a layer
    PYTHONPATH=CHECKOUT python3 micro_fg.py --quick          the current kernel and the best guesses
    TRITON_INTERPRET=1 PYTHONPATH=CHECKOUT python3 micro_fg.py      small shapes on a CPU, errors only

The factors' gradients are taken from the weight's gradient, fp32 [out, in], whose shape does not
depend on the number of tokens: 5120 x 2880 (queries, keys and values joined: three layers) and
2880 x 4096 (output), at 4,096 and at 16,384 tokens alike. What depends on it is the product that
makes the weight's gradient, timed beside them because its result may still be in the L2 cache
("warm" below; "cold" flushes the cache before each call).

Variants: `current` (sparselong/kernels/dense/factor_gradients.py); `two`: tensor cores (bf16x6: each
fp32 operand as three bf16 parts, the six larger products, fp32 sums; tf32x3: two tf32 parts, three
products), shares added by a second launch; `one`: the same, and the last program that arrives for a column tile, or for a row tile, adds its
shares in their fixed order: one launch, same bits in every run.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import sys
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sparselong.kernels.dense import factor_gradients as current

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


class Variant(NamedTuple):
    """One setting of the new kernel."""

    one: bool
    rows: int = 16
    steps: int = 16
    blocks: int = 4
    precision: str = "tf32x3" if INTERPRETED else "bf16x6"

    def __str__(self) -> str:
        return (
            f"{'one' if self.one else 'two'} {self.precision} rows {self.rows} x {self.steps}, "
            f"columns {32 * self.blocks}"
        )


@triton.jit(do_not_specialize=["rows", "first_rows", "second_rows", "first_tiles", "second_tiles"])
def joint_kernel(
    outer_ptr, gate_ptr, a_ptr, b_ptr, a2_ptr, b2_ptr, a3_ptr, b3_ptr, a_share_ptr, b_share_ptr,
    grad_a_ptr, grad_b_ptr, arrived_ptr, scaling,
    rows, columns, rank, first_rows, second_rows, first_tiles, second_tiles,
    HAS_GATE: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCKS: tl.constexpr,
    RANKS: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a tile's shares; the last tile of a column, or of a row, adds them."""
    tile, column_tile, part = tl.program_id(2), tl.program_id(1), tl.program_id(0)
    tiles, column_tiles = tl.num_programs(2), tl.num_programs(1)
    layer, begin, end, before, after = 0, 0, first_rows, 0, first_tiles
    if tile >= second_tiles:
        a_ptr, b_ptr, layer, begin, end, before, after = (
            a3_ptr, b3_ptr, 2, second_rows, rows, second_tiles, tiles,
        )  # fmt: skip
    elif tile >= first_tiles:
        a_ptr, b_ptr, layer, begin, end, before, after = (
            a2_ptr, b2_ptr, 1, first_rows, second_rows, first_tiles, second_tiles,
        )  # fmt: skip
    r = part * RANKS + tl.arange(0, RANKS)
    block = column_tile * BLOCKS + tl.arange(0, BLOCKS)
    lane = tl.arange(0, 32)
    bit = (1 << lane)[None, None, :]
    # Axes are [blocks, rows or ranks, lanes]: with a warp for each block, warps share no sums of
    # dA, and of dB each has its own, added below; no operand is needed by two warps.
    column = block[:, None] * 32 + lane[None, :]
    real_rank, real_column = r < rank, column < columns
    a_size, b_size = rank * columns, rows * rank
    a_share = tl.zeros([BLOCKS, RANKS, 32], tl.float32)
    a_at = a_ptr + r[None, None, :] * columns + column[:, :, None]
    a = tl.load(a_at, mask=real_column[:, :, None] & real_rank[None, None, :], other=0.0)
    first = begin + (tile - before) * STEPS * ROWS
    for step in tl.range(STEPS, num_stages=1):
        row = first + step * ROWS + tl.arange(0, ROWS)
        real = row < end
        at = row[None, :, None] * columns + column[:, None, :]
        inside = real[None, :, None] & real_column[:, None, :]
        grad = tl.load(outer_ptr + at, mask=inside, other=0.0)
        if HAS_GATE:
            by_block = real[None, :] & (block * 32 < columns)[:, None]
            word_at = gate_ptr + row[None, :] * (columns // 32) + block[:, None]
            word = tl.load(word_at, mask=by_block, other=0)
            grad = tl.where((word[:, :, None] & bit) != 0, grad, 0.0)
        b_at = b_ptr + (row - begin)[None, :] * rank + r[:, None]
        b = tl.load(b_at, mask=real[None, :] & real_rank[:, None], other=0.0)
        b = tl.broadcast_to(b[None, :, :], [BLOCKS, RANKS, ROWS])
        a_share = tl.dot(b, grad, a_share, input_precision=PRECISION)
        b_share = tl.sum(tl.dot(grad, a, input_precision=PRECISION), 0)
        b_at = b_share_ptr + column_tile.to(tl.int64) * b_size + row[:, None] * rank + r[None, :]
        tl.store(b_at, b_share, mask=real[:, None] & real_rank[None, :])
    a_place = r[None, :, None] * columns + column[:, None, :]
    a_mask = real_rank[None, :, None] & real_column[:, None, :]
    tl.store(a_share_ptr + tile.to(tl.int64) * a_size + a_place, a_share, mask=a_mask)
    if ONE:
        tl.debug_barrier()  # all threads' shares are written before the counters tell of them
        own = arrived_ptr + (part * 3 + layer) * column_tiles + column_tile
        if tl.atomic_add(own, 1, sem="acq_rel") == after - before - 1:
            total = tl.zeros([BLOCKS, RANKS, 32], tl.float32)
            each = a_share_ptr + before * a_size + a_place
            for share in range(before, after, 4):
                for n in tl.static_range(4):
                    real = a_mask & (share + n < after)
                    total += tl.load(each, mask=real, other=0.0, cache_modifier=".cg")
                    each += a_size
            tl.store(grad_a_ptr + layer * a_size + a_place, total * scaling, mask=a_mask)
            tl.store(own, 0)
        own = arrived_ptr + tl.num_programs(0) * 3 * column_tiles + part * tiles + tile
        if tl.atomic_add(own, 1, sem="acq_rel") == column_tiles - 1:
            for step in range(STEPS):
                row = first + step * ROWS + tl.arange(0, ROWS)
                b_place = row[:, None] * rank + r[None, :]
                b_mask = (row < end)[:, None] & real_rank[None, :]
                total = tl.zeros([ROWS, RANKS], tl.float32)
                each = b_share_ptr + b_place
                for share in range(0, column_tiles, 4):
                    for n in tl.static_range(4):
                        real = b_mask & (share + n < column_tiles)
                        total += tl.load(each, mask=real, other=0.0, cache_modifier=".cg")
                        each += b_size
                tl.store(grad_b_ptr + b_place, total * scaling, mask=b_mask)
            tl.store(own, 0)


_arrived: dict[tuple, torch.Tensor] = {}


def run(variant: Variant, outer, gate, pairs, scaling):
    """Do what `factor_gradients` does."""
    (rows, columns), rank = outer.shape, pairs[0][0].shape[0]
    sizes = [b.shape[0] for _, b in pairs]
    tiles = [-(-size // (variant.steps * variant.rows)) for size in sizes]
    column_tiles = -(-columns // (32 * variant.blocks))
    parts = -(-rank // 16)
    like: dict[str, Any] = {"dtype": torch.float32, "device": outer.device}
    a_shares = torch.empty(sum(tiles), rank, columns, **like)
    b_shares = torch.empty(column_tiles, rows, rank, **like)
    grad_a = torch.empty(len(pairs), rank, columns, **like)
    grad_b = torch.empty(rows, rank, **like)
    if INTERPRETED:
        for one in (a_shares, b_shares, grad_a, grad_b):
            one.fill_(float("nan"))
    key = (outer.device, parts, column_tiles, sum(tiles))
    if key not in _arrived:
        counters = parts * (3 * column_tiles + sum(tiles))
        _arrived[key] = torch.zeros(counters, dtype=torch.int32, device=outer.device)
    row_ends, tile_ends = ((each[0], sum(each[:2])) for each in (sizes, tiles))
    given = (*pairs, pairs[-1], pairs[-1])[:3]
    joint_kernel[(parts, column_tiles, sum(tiles))](
        *(outer, outer if gate is None else gate, *(each for pair in given for each in pair)),
        *(a_shares, b_shares, grad_a, grad_b, _arrived[key], scaling),
        *(rows, columns, rank, *row_ends, *tile_ends),
        HAS_GATE=gate is not None, ROWS=variant.rows, STEPS=variant.steps, BLOCKS=variant.blocks,
        RANKS=16, ONE=variant.one, PRECISION=variant.precision, num_warps=variant.blocks,
    )  # fmt: skip
    if not variant.one:
        width, depth = current.SUM_WIDTH, current.SUM_DEPTH
        blocks = len(pairs) * -(-rank * columns // width) + -(-rows * rank // width)
        current.add_shares_kernel[(blocks,)](
            *(a_shares, b_shares, grad_a, grad_b, scaling, rank * columns, rows * rank),
            *(len(pairs), *tile_ends, sum(tiles), column_tiles),
            WIDTH=width, DEPTH=depth, num_warps=4,
        )  # fmt: skip
    assert not INTERPRETED or not bool(_arrived[key].any()), "counters are not at zero"
    return list(zip(grad_a.unbind(), grad_b.split(sizes), strict=True))


def draw(sizes: tuple[int, ...], columns: int, rank: int):
    """Return a weight's gradient, a gate that passes half of it, and factors."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    rows, like = sum(sizes), {"generator": generator, "device": DEVICE}
    outer = torch.randn(rows, columns, **like)
    gate = torch.randint(-(2**31), 2**31, (rows, columns // 32), dtype=torch.int64, **like)
    pairs = [
        (torch.randn(rank, columns, **like) * 0.02, torch.randn(size, rank, **like) * 0.02)
        for size in sizes
    ]
    return outer, gate.to(torch.int32), pairs


def exact_of(outer, gate, pairs, scaling, dtype=torch.float64):
    """Return the gradients in fp64, or as torch's fp32 products make them."""
    bits = (gate[..., None] >> torch.arange(32, device=gate.device)) & 1
    passed = (outer * bits.flatten(1)).to(dtype) * scaling
    parts = passed.split([len(b) for _, b in pairs])
    return [
        each
        for (a, b), part in zip(pairs, parts, strict=True)
        for each in (b.to(dtype).T @ part, part @ a.to(dtype).T)
    ]


def errors(found, exact) -> float:
    """Return the largest relative L2 error; infinite where one is NaN."""
    worst = 0.0
    for one, true in zip(found, exact, strict=True):
        error = float((one.double() - true).norm() / true.norm())
        worst = max(worst, error if error == error else float("inf"))
    return worst


def microseconds(call, cold: bool) -> float:
    """Return the median device time of 30 calls."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda") if cold else None
    times = []
    for _ in range(35):
        if flush is not None:
            flush.zero_()
        else:
            torch.cuda._sleep(20_000)  # the host runs ahead
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "12")
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[5:])


def variants(quick: bool):
    """Yield the settings to compare."""
    yield Variant(True)
    yield Variant(False)
    if quick:
        return
    for one, precision, rows, steps, blocks in itertools.product(
        (True, False), ("bf16x6", "tf32x3"), (16, 32, 64), (2, 4, 8, 16, 32), (2, 4, 8)
    ):
        if rows * steps in (128, 256, 512) and rows * blocks <= 256:
            yield Variant(one, rows, steps, blocks, precision)


def main() -> None:
    """Print a table for each shape."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    shapes = {
        "queries, keys, values: 5120 x 2880": ((4096, 512, 512), 2880),
        "output: 2880 x 4096": ((2880,), 4096),
    }
    if INTERPRETED:
        from sparselong.kernels.dense import factor_gradients as module

        class Cuda:
            device_of = staticmethod(lambda _: contextlib.nullcontext())

        class Torch:
            cuda = Cuda()

            def __getattr__(self, name):
                return getattr(torch, name)

        module.torch = Torch()
        shapes = {"small": ((300, 64, 96), 288), "one": ((130,), 160)}
    torch.backends.cuda.matmul.allow_tf32 = False
    if not INTERPRETED:
        print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    for name, (sizes, columns) in shapes.items():
        rows = sum(sizes)
        print(f"\n{name}, rank {args.rank}")
        if not INTERPRETED:
            for tokens in (4096, 16_384):
                dy, x = (
                    torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16)
                    for n in (rows, columns)
                )
                us = microseconds(lambda: torch.mm(dy.T, x, out_dtype=torch.float32), False)
                print(f"  the weight's gradient itself, {tokens} tokens: {us:.0f} us")
                del dy, x
        outer, gate, pairs = draw(sizes, columns, args.rank)
        scaling = 2.0
        exact = exact_of(outer, gate, pairs, scaling)
        plain = errors(exact_of(outer, gate, pairs, scaling, torch.float32), exact)
        print(f"  torch's fp32 products: error {plain:.2e}; allowed: {2 * plain:.2e}")
        print(f"  {'variant':58} {'error':>9} {'repeats':>7} {'cold us':>8} {'warm us':>8}")
        rows_of = [("current", lambda: current.factor_gradients(outer, gate, pairs, scaling))]
        for v in variants(args.quick):
            rows_of.append((str(v), lambda v=v: run(v, outer, gate, pairs, scaling)))
        best: list[tuple[float, str]] = []
        for label, call in rows_of:
            try:
                found = [each for pair in call() for each in pair]
                again = [[each for pair in call() for each in pair] for _ in range(3)]
            except Exception as error:  # a setting that does not compile or fit
                print(f"  {label:58} {type(error).__name__}: {str(error)[:60]}")
                continue
            repeats = all(all(map(torch.equal, found, other)) for other in again)
            wrong = errors(found, exact)
            times = [0.0, 0.0]
            if not INTERPRETED:
                times = [microseconds(call, cold) for cold in (True, False)]
            mark = "" if wrong <= 2 * plain and repeats else "  REFUSED"
            print(
                f"  {label:58} {wrong:9.2e} {str(repeats):>7} {times[0]:8.1f} {times[1]:8.1f}{mark}"
            )
            if not mark:
                best.append((times[0], label))
        print(
            "  fastest that keep the promise:", *(f"\n    {t:.1f} {n}" for t, n in sorted(best)[:3])
        )


if __name__ == "__main__":
    sys.exit(main())
