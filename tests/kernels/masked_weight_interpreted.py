"""Runs the masked weight's kernel in Triton's interpreter; dense/test_masked_weight.py starts it.

Runs in its own process, because the interpreter must be chosen before Triton is imported. Prints
one JSON document: for each case the fraction of elements that differ from the definition, in the
weight and in the gradient's gate, and the relative L2 errors of the factors' gradients.
"""

import os

if __name__ == "__main__":  # tests/gpu imports the cases and compiles the kernel
    os.environ["TRITON_INTERPRET"] = "1"

import contextlib
import json
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from sparselong.kernels.dense import factor_gradients, masked_weight
from sparselong.kernels.dense.masked_weight import MaskedWeight
from tests.poisoned import PoisonedTorch
from tests.references.masked_weight import masked_weight_reference


@dataclass(frozen=True)
class Case:
    """One weight; shapes leave partial tiles, and ranks include non-powers of two.

    Attributes:
        even_scale: every second row's scale; drawn at random if None.
        exponent: weights and scales are multiplied by 2^exponent.
        layers: layers of these rows that follow each other.
        more: rows of the first layer beyond those of the others.
    """

    bits: int
    sparse: bool
    rank: int = 4
    rows: int = 40
    columns: int = 192
    even_scale: float | None = None
    exponent: int = 0
    layers: int = 1
    more: int = 0


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
    Case(16, False, columns=100),  # without mask and scale a row need not be whole blocks
    Case(8, True, rank=8, rows=64, columns=288, layers=3, more=96),  # partial row tiles
    Case(4, True, rank=36, rows=128, columns=128),  # whole tiles; three parts of the rank
]


def draw(case: Case, device: str = "cpu") -> MaskedWeight:
    """Draw weights with random patterns; some saturate."""
    generator = torch.Generator().manual_seed(case.bits + case.rank)
    sizes = [case.rows + case.more, *[case.rows] * (case.layers - 1)]
    total = sum(sizes)
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
    pairs, half = [], 2.0 ** (case.exponent // 2)  # of the product's size, for each factor
    for size in sizes:
        a = half * torch.randn(case.rank, case.columns, generator=generator)
        b = 0.2 * half * torch.randn(size, case.rank, generator=generator)
        pairs.append((a.to(device), b.to(device)))
    first, *more = pairs
    rest = (0.5, patterns, scale, case.bits, tuple(more))
    return MaskedWeight(master.to(device), *first, *rest)


class Cuda:
    """torch.cuda without a device."""

    @staticmethod
    def device_of(_: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def current_stream() -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=0)


class Poisoned(PoisonedTorch):
    """Without a device."""

    cuda = Cuda()


def compare(case: Case, weight: MaskedWeight) -> dict[str, Any]:
    """Return the fractions of elements in which the kernels differ from the definition, and the
    largest relative error of the factors' gradients, given the kernel's own gate.

    The interpreter truncates fp32 to bf16 where a GPU rounds, so torch rounds here.
    """
    rounded = torch.full_like(weight.master, float("nan"), dtype=torch.float32)
    weight._launch(rounded, None)
    expected, passes = masked_weight_reference(**vars(weight))
    passing, words = passes, None
    if weight.patterns is not None or weight.scale is not None:
        words = torch.full((len(passes), case.columns // 32), 77, dtype=torch.int32)
        words = words.to(passes.device)
        again = torch.full_like(rounded, float("nan"))
        weight._launch(again, words)
        assert torch.equal(again, rounded), "the gate must not change the weight"
        passing = unpack_gate(words)
    outer = torch.randn(weight.master.shape, device=passes.device)
    runs = [
        factor_gradients.factor_gradients(outer, words, weight.pairs, weight.scaling) for _ in "12"
    ]
    got, repeated = ([each for pair in run for each in pair] for run in runs)
    assert all(map(torch.equal, got, repeated)), "the gradients do not repeat"
    exact = factor_gradients_reference(outer, passing, weight)
    return {
        "name": str(case),
        "weight": float((rounded.to(torch.bfloat16) != expected).float().mean()),
        "gate": float((passing != passes).float().mean()),
        "passing": float(passes.float().mean()),
        "gradients": max(error(one, true) for one, true in zip(got, exact, strict=True)),
        "plain": max(
            error(one, true)
            for one, true in zip(plain_gradients(outer, passing, weight), exact, strict=True)
        ),
    }


def unpack_gate(words: torch.Tensor) -> torch.Tensor:
    """Return the gate as bool [out, in]."""
    bits = words[..., None] >> torch.arange(32, device=words.device)
    return (bits & 1).bool().flatten(1)


def error(one: torch.Tensor, true: torch.Tensor) -> float:
    """Return the relative L2 error; NaN if `one` contains NaN."""
    return float((one.double() - true).norm() / true.norm())


def factor_gradients_reference(
    outer: torch.Tensor, passing: torch.Tensor, weight: MaskedWeight
) -> list[torch.Tensor]:
    """Return the gradients of each layer's A and B in fp64, by autograd through the sum."""
    leaves = [f.double().requires_grad_() for pair in weight.pairs for f in pair]
    pairs = zip(leaves[::2], leaves[1::2], strict=True)
    total = weight.scaling * torch.cat([b @ a for a, b in pairs])
    return list(torch.autograd.grad(total, leaves, outer.double() * passing))


def plain_gradients(
    outer: torch.Tensor, passing: torch.Tensor, weight: MaskedWeight
) -> list[torch.Tensor]:
    """Return the gradients by torch's fp32 products."""
    passed, found = outer * passing * weight.scaling, []
    parts = passed.split([len(b) for _, b in weight.pairs])
    for (a, b), part in zip(weight.pairs, parts, strict=True):
        found += [b.T @ part, part @ a.T]
    return found


def widen(weight: MaskedWeight) -> MaskedWeight:
    """Convert to fp32: the interpreter, unlike a GPU, reads subnormal bf16 as zero."""
    scale = None if weight.scale is None else weight.scale.float()
    return replace(weight, master=weight.master.float(), scale=scale)


if __name__ == "__main__":
    masked_weight.torch = factor_gradients.torch = Poisoned()  # pyright: ignore
    factor_gradients.CONSTANTS["PRECISION"] = "ieee"  # the interpreter's products are exact
    print(json.dumps([compare(case, widen(draw(case))) for case in CASES]))
