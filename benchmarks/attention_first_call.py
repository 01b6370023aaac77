#!/usr/bin/env python3
"""Duration of first attention calls: with nothing compiled, at a new length, in a later process.

A separate process runs forward and backward once for each backend and kind of layer, at one length
and then at another. It is started with an empty cache of compiled Triton kernels, and again with
that cache. The files added to the cache by each call are counted: none means that nothing was
compiled, except by FlashAttention-4, which keeps its kernels in the process. CUDA is initialized
before; the figures include loading its libraries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.attention_cases import WINDOW, draw, kind_of, make_runs, pack, skips
from benchmarks.record import row

LENGTHS = (4096, 5000)
CASES = ((None, False), (None, True), (WINDOW, False), (WINDOW, True))


def count_files(folder: str) -> int:
    """Return the number of compiled kernels below a folder."""
    return sum(1 for path in Path(folder).rglob("*.cubin"))


def call_all(cache: str) -> list[dict]:
    """Return one entry per call: backend, kind, packed, tokens, seconds, compiled kernels."""
    torch.ones(8, 8, device="cuda").matmul(torch.ones(8, 8, device="cuda"))
    found = []
    for name, run in make_runs(["triton", "torch_flash", "torch_cudnn", "flash_attn_4"]).items():
        for window, packed in CASES:
            for tokens in LENGTHS:
                if skips(name, window, packed, tokens):
                    continue
                leaves = draw(tokens)
                bounds = pack(tokens) if packed else None
                before = count_files(cache)
                torch.cuda.synchronize()
                started = time.perf_counter()
                out = run(*leaves[:4], window, bounds)
                torch.autograd.grad(out, leaves[:4], leaves[4])
                torch.cuda.synchronize()
                found.append({
                    "backend": name, "kind": kind_of(window), "packed": packed, "tokens": tokens,
                    "seconds": time.perf_counter() - started,
                    "compiled": count_files(cache) - before,
                })  # fmt: skip
    return found


def measure_first_calls() -> list[dict]:
    """Return rows of `first_call_seconds` and `first_call_compiled_kernels` for every call."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for process in ("first", "later"):
            done = subprocess.run(
                [sys.executable, __file__, cache],
                env=os.environ | {"TRITON_CACHE_DIR": cache},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"{__file__}: {done.stderr}")
            for entry in json.loads(done.stdout):
                name, seconds, compiled = (
                    entry.pop(key) for key in ("backend", "seconds", "compiled")
                )
                case = {**entry, "process": process}
                rows.append(row(case, name, "first_call_seconds", seconds, "s"))
                rows.append(row(case, name, "first_call_compiled_kernels", compiled, "1"))
                print(f"{name} {case}: {seconds:.2f} s, {compiled} kernels", file=sys.stderr)
    return rows


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(call_all(sys.argv[1])))
    else:
        print("benchmarks/attention_first_call.py is part of benchmarks/attention.py")
