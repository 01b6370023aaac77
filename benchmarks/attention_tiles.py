#!/usr/bin/env python3
"""Time tile sizes of the Triton attention kernels; kernels/attention/tiles.py has the best ones.

Candidates are compiled in parallel first, then timed one by one. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from triton.testing import do_bench

from benchmarks.attention_cases import pack
from benchmarks.command_line import add_result, has_device, machine_of
from benchmarks.record import row, write
from sparselong.kernels import gpu
from sparselong.kernels.attention import tiles as attention_tiles
from sparselong.kernels.attention import triton_launch as attention_triton
from sparselong.kernels.attention.mask import AttentionCall, Mask, SavedForward, find_documents
from sparselong.kernels.attention.tiles import Tile

Job = tuple[str, str, Tile]


# (rows, keys, warps, stages) that neither spill heavily nor exceed shared memory.
_SHAPES = {
    "forward": (((128,), (32, 64, 128), (4, 8), (2, 3)), ((64,), (32, 64), (4,), (2, 3))),
    "dq": (((128,), (32, 64), (8,), (2, 3)), ((64,), (32, 64, 128), (4,), (2, 3))),
    "dkdv": (((64, 128), (64, 128), (8,), (2, 3)), ((32, 64), (64, 128), (4,), (2, 3))),
}
_LAYOUTS = {  # (heads per tile, whether the unmasked part has a loop of its own)
    "full": ((1, True), (8, True), (8, False)),
    "packed": ((1, True), (1, False), (8, True), (8, False)),
    "window": ((8, False),),
}


def list_candidates(kinds: list[str]) -> list[Job]:
    """Return (stage, kind, tile) for every tile worth compiling."""
    return [
        (stage, kind, Tile(*shape, heads=heads, split=split))
        for stage, grids in _SHAPES.items()
        for kind in kinds
        for heads, split in _LAYOUTS[kind]
        for grid in grids
        for shape in itertools.product(*grid)
    ]


def prepare(kind: str, tokens: int) -> tuple:
    """Return an upstream gradient, random inputs in gpt-oss's shape, and the call."""
    torch.manual_seed(0)
    shape = {"device": "cuda", "dtype": torch.bfloat16}
    q, dout = (torch.randn(1, tokens, 64, 64, **shape).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(1, tokens, 8, 64, **shape).transpose(1, 2) for _ in range(2))
    sinks = torch.randn(64, device="cuda")
    documents = find_documents(pack(tokens), 1, tokens) if kind == "packed" else None
    window = 128 if kind == "window" else None
    call = AttentionCall(Mask(1, tokens, tokens, 0, window, documents), 0.125, needs_dsinks=False)
    return dout, q, k, v, sinks, call


def make_call(stage: str, inputs: tuple, out: torch.Tensor, lse: torch.Tensor):
    """Return a function without arguments that launches one stage."""
    dout, *given, call = inputs
    done = SavedForward(*given, out, lse)
    if stage == "forward":
        return lambda: attention_triton.attend(*given, call)
    if stage == "dq":
        return lambda: attention_triton.launch_dq(dout, done, call)
    delta = torch.zeros_like(lse)
    return lambda: attention_triton.launch_dkdv(dout, done, delta, call)


def use(stage: str, kind: str, tile: Tile) -> None:
    """Enter the tile in this process's table."""
    name = gpu.tiles_of(torch.device("cuda"))
    attention_tiles.TILES[name][stage, kind] = tile


def compile_one(job: Job) -> str | None:
    """Compile a candidate by running it on a short sequence; return the error, or None."""
    stage, kind, tile = job
    inputs = prepare(kind, 256)
    out, lse = inputs[1].clone(), torch.zeros(1, 64, 256, device="cuda")
    use(stage, kind, tile)
    try:
        make_call(stage, inputs, out, lse)()
        torch.cuda.synchronize()
    except Exception as error:  # that a candidate does not fit is a result
        return f"{type(error).__name__}: {error}"[:200]
    return None


def main() -> None:
    """Time all candidates, write the results and print the best ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--kinds", nargs="+", default=list(_LAYOUTS), choices=list(_LAYOUTS))
    parser.add_argument("--workers", type=int, default=14)
    add_result(parser)
    args = parser.parse_args()
    if not has_device(__file__):
        return
    jobs = list_candidates(args.kinds)
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        errors = list(pool.map(compile_one, jobs, chunksize=2))
    rows = []
    cases = {kind: prepare(kind, args.tokens) for kind in args.kinds}
    made = {k: attention_triton.attend(*c[1:])[:2] for k, c in cases.items()}
    for (stage, kind, tile), error in zip(jobs, errors, strict=True):
        if error is not None:
            print(stage, kind, tile, error, file=sys.stderr)
            continue
        use(stage, kind, tile)
        call = make_call(stage, cases[kind], *made[kind])
        ms = do_bench(call, warmup=5, rep=25, return_mode="median")
        case = {"stage": stage, "kind": kind, "tokens": args.tokens, "tile": vars(tile)}
        rows.append(row(case, "triton", "ms", ms, "ms"))
    machine = machine_of(args)
    command = f"python3 benchmarks/attention_tiles.py --kinds {' '.join(args.kinds)}"
    print(write("attention_tiles", machine, command, rows, args.folder))
    for stage, kind in itertools.product(_SHAPES, args.kinds):
        own = [r for r in rows if (r["case"]["stage"], r["case"]["kind"]) == (stage, kind)]
        for best in sorted(own, key=lambda r: r["value"])[:6]:
            print(stage, kind, f"{best['value']:.3f} ms", best["case"]["tile"])


if __name__ == "__main__":
    main()
