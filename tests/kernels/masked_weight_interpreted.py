"""Runs the masked weight's kernel in Triton's interpreter; test_masked_weight.py starts it.

A process of its own, because the interpreter must be chosen before Triton is imported. Prints one
JSON document: for each case how many elements differ from plain torch, of how many, and the same
for the gradient's gate.
"""

import os

if __name__ == "__main__":  # tests/gpu takes the cases and compiles
    os.environ["TRITON_INTERPRET"] = "1"

import json
from dataclasses import dataclass
from typing import Any

import torch

from sparselong.kernels import masked_weight_ref as reference
from sparselong.kernels.masked_weight import MaskedWeight


@dataclass(frozen=True)
class Case:
    """One weight; shapes do not fill the kernel's tiles, ranks are powers of two and not."""

    bits: int
    sparse: bool
    rank: int = 4
    rows: int = 40
    columns: int = 192
    zero_scale: bool = False


CASES = [
    *(Case(bits, sparse) for bits in (4, 8, 16) for sparse in (True, False)),
    Case(4, True, rank=20),
    Case(4, True, rows=1, columns=32),
    Case(4, True, zero_scale=True),
]


def draw(case: Case, device: str = "cpu") -> MaskedWeight:
    """Weights of which some saturate, in random patterns."""
    generator = torch.Generator().manual_seed(case.bits + case.rank)
    shape = (case.rows, case.columns)
    master = torch.randn(shape, generator=generator).to(torch.bfloat16)
    patterns = None
    if case.sparse:
        numbers = torch.randint(6, (case.rows, case.columns // 32, 8), generator=generator)
        words = (numbers << torch.arange(0, 24, 3)).sum(-1)
        parts = (words[..., None] >> torch.tensor([0, 8, 16])) & 255
        patterns = parts.to(torch.uint8).flatten(1).to(device)
    scale = None
    if case.bits < 16:
        scale = 0.1 + torch.rand(case.rows, case.columns // 32, generator=generator) * 0.3
        scale = (scale / (1 if case.bits == 4 else 16)).to(torch.bfloat16).to(device)
        if case.zero_scale:
            scale[::2] = 0.0
    a = torch.randn(case.rank, case.columns, generator=generator).to(device)
    b = 0.2 * torch.randn(case.rows, case.rank, generator=generator).to(device)
    return MaskedWeight(master.to(device), a, b, 0.5, patterns, scale, case.bits)


def compare(case: Case, weight: MaskedWeight) -> dict[str, Any]:
    """Shares of elements that differ, from the kernel (launched directly) to plain torch.

    The interpreter cuts fp32 down to bf16 where a GPU rounds: here torch does it.
    """
    rounded = torch.full_like(weight.master, float("nan"), dtype=torch.float32)
    weight._launch(rounded, gate=False)
    rounded = rounded.to(torch.bfloat16)
    upstream = torch.randn(weight.master.shape, device=weight.master.device)
    gated = upstream.clone()
    weight._launch(gated, gate=True)
    expected = reference.round_weight(**vars(weight))
    passes = reference.passes(**vars(weight))
    return {
        "name": str(case),
        "weight": float((rounded != expected).float().mean()),
        "gate": float((gated != upstream * passes).float().mean()),
        "passing": float(passes.float().mean()),
    }


if __name__ == "__main__":
    print(json.dumps([compare(case, draw(case)) for case in CASES]))
