"""Runs the sweep's kernel in Triton's interpreter; sweep/test_sweep.py starts it.

Runs in its own process, because the interpreter must be chosen before Triton is imported. Prints
one JSON document: for each case the number of elements in which the kernel's results differ from
those of plain torch, by result.
"""

import os

if __name__ == "__main__":  # tests/gpu imports the cases and compiles the kernel
    os.environ["TRITON_INTERPRET"] = "1"

import contextlib
import json
from dataclasses import dataclass

import numpy
import torch

from sparselong.kernels.sweep import Swept, op, sweep_columns, triton_sweep
from sparselong.packing.dense import DenseFormat
from tests.kernels.interpreter import patch_once
from tests.poisoned import PoisonedTorch


@dataclass(frozen=True)
class Case:
    """One weight.

    Attributes:
        columns: not always whole blocks of 128.
        special: one huge input column, one column of zero weights, a row of zeros.
    """

    bits: int
    sparse: bool
    group: int = 32
    rows: int = 3
    columns: int = 160
    special: bool = False

    @property
    def format(self) -> DenseFormat:
        """The storage format."""
        return DenseFormat(self.bits, "2:4" if self.sparse else "none", self.group)  # type: ignore[arg-type]


CASES = [
    Case(4, True, group=64, rows=17, columns=64),  # a second program with one row
    Case(4, True, special=True),
    Case(8, False),
    Case(16, True),
]


def draw(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight and the upper factor of the inverse of a correlated Hessian, both fp32."""
    generator = torch.Generator().manual_seed(case.bits + case.columns)
    width = case.columns
    weight = 0.05 * torch.randn(case.rows, width, generator=generator)
    mixed = torch.randn(2 * width, width, generator=generator, dtype=torch.float64)
    mixed = (
        mixed
        / torch.arange(1, width + 1).sqrt()
        @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    )
    if case.special:
        mixed[:, 9] *= 100.0
        weight[:, 5] = 0.0
        weight[0] = 0.0
        weight[1, 70] = 3.0
    hessian = mixed.T @ mixed / len(mixed)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(width)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    return weight, factor.float().contiguous()


class Cuda:
    """torch.cuda without a device."""

    @staticmethod
    def device_of(_: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Poisoned(PoisonedTorch):
    """Without a device."""

    cuda = Cuda()


def count_differences(one: Swept, other: Swept) -> dict[str, int]:
    """Return the number of different elements of each result; NaN differs from everything."""
    return {
        name: int((getattr(one, name).cpu() != value.cpu()).sum())
        for name, value in other._asdict().items()
        if value is not None
    }


if __name__ == "__main__":
    patch_once()
    numpy.seterr(all="ignore")
    op.torch = triton_sweep.torch = Poisoned()  # pyright: ignore
    found = []
    for case in CASES:
        plain = sweep_columns(*draw(case), case.format)
        original, op.torch_sweep.sweep = op.torch_sweep.sweep, triton_sweep.launch_sweep
        kernel = sweep_columns(*draw(case), case.format)
        op.torch_sweep.sweep = original
        found.append(count_differences(kernel, plain))
    print(json.dumps(found))
