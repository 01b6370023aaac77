"""Runs the masked weight's kernel in Triton's interpreter; dense/test_masked_weight.py starts it.

Runs in its own process, because the interpreter must be chosen before Triton is imported. Prints
one JSON document: for each case the fraction of elements that differ from the definition, in the
weight and in the gradient's gate.
"""

import os

if __name__ == "__main__":  # tests/gpu imports the cases and compiles the kernel
    os.environ["TRITON_INTERPRET"] = "1"

import json
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparselong.kernels.dense.masked_weight import MaskedWeight
from tests.references.masked_weight import masked_weight_reference


@dataclass(frozen=True)
class Case:
    """One weight; shapes leave partial tiles, and ranks include non-powers of two.

    Attributes:
        even_scale: every second row's scale; drawn at random if None.
        exponent: weights and scales are multiplied by 2^exponent.
        layers: layers of these rows that follow each other.
    """

    bits: int
    sparse: bool
    rank: int = 4
    rows: int = 40
    columns: int = 192
    even_scale: float | None = None
    exponent: int = 0
    layers: int = 1


CASES = [
    *(Case(bits, sparse) for bits in (4, 8, 16) for sparse in (True, False)),
    Case(4, True, rank=20),
    Case(4, True, rows=1, columns=32),
    Case(4, True, even_scale=0.0),
    # 1 / scale overflows fp32; then the quotients overflow.
    Case(4, False, even_scale=2.0**-130),
    Case(8, False, even_scale=2.0**-127),
    Case(4, True, exponent=-128),  # subnormal scales
    Case(8, True, exponent=-124),
    Case(4, True, exponent=120),
    Case(4, True, rows=64, layers=2),
    Case(16, False, rank=20, rows=32, layers=3),
]


def draw(case: Case, device: str = "cpu") -> MaskedWeight:
    """Draw weights with random patterns; some saturate."""
    generator = torch.Generator().manual_seed(case.bits + case.rank)
    total = case.rows * case.layers
    shape = (total, case.columns)
    master = torch.randn(shape, generator=generator).to(torch.bfloat16) * 2.0**case.exponent
    patterns = None
    if case.sparse:
        numbers = torch.randint(6, (total, case.columns // 32, 8), generator=generator)
        words = (numbers << torch.arange(0, 24, 3)).sum(-1)
        parts = (words[..., None] >> torch.tensor([0, 8, 16])) & 255
        patterns = parts.to(torch.uint8).flatten(1).to(device)
    scale = None
    if case.bits < 16:
        scale = 0.1 + torch.rand(total, case.columns // 32, generator=generator) * 0.3
        scale = (scale / (1 if case.bits == 4 else 16)).to(torch.bfloat16).to(device)
        scale *= 2.0**case.exponent
        if case.even_scale is not None:
            scale[::2] = case.even_scale
    pairs = []
    for _ in range(case.layers):
        a = torch.randn(case.rank, case.columns, generator=generator).to(device)
        b = 0.2 * 2.0**case.exponent * torch.randn(case.rows, case.rank, generator=generator)
        pairs.append((a, b.to(device)))
    first, *more = pairs
    rest = (0.5, patterns, scale, case.bits, tuple(more))
    return MaskedWeight(master.to(device), *first, *rest)


def compare(case: Case, weight: MaskedWeight) -> dict[str, Any]:
    """Return the fractions of elements in which the kernel differs from the definition.

    The interpreter truncates fp32 to bf16 where a GPU rounds, so torch rounds here.
    """
    rounded = torch.full_like(weight.master, float("nan"), dtype=torch.float32)
    weight._launch(rounded, gate=False)
    rounded = rounded.to(torch.bfloat16)
    upstream = torch.randn(weight.master.shape, device=weight.master.device)
    gated = upstream.clone()
    weight._launch(gated, gate=True)
    expected, passes = masked_weight_reference(**vars(weight))
    return {
        "name": str(case),
        "weight": float((rounded != expected).float().mean()),
        "gate": float((gated != weight.scaling * upstream * passes).float().mean()),
        "passing": float(passes.float().mean()),
    }


def widen(weight: MaskedWeight) -> MaskedWeight:
    """Convert to fp32: the interpreter, unlike a GPU, reads subnormal bf16 as zero."""
    scale = None if weight.scale is None else weight.scale.float()
    return replace(weight, master=weight.master.float(), scale=scale)


if __name__ == "__main__":
    print(json.dumps([compare(case, widen(draw(case))) for case in CASES]))
