"""Runs the kernel that joins parts of attention in Triton's interpreter, on parts with the memory
layouts of the backends; attention/test_op.py starts it.

Runs in its own process, because the interpreter must be chosen before Triton is imported. Prints
one JSON document: for each case the relative L2 errors of out and lse against fp64, NaN if a result
contains NaN.
"""

import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import json
from unittest import mock

import torch

from sparselong.kernels.attention import join as attention_join

CASES = {
    "one_part": (1, 1, 130, torch.float32),
    "two_parts": (2, 1, 64, torch.float32),
    "two_rows": (2, 2, 70, torch.float32),
    "half": (2, 2, 33, torch.float16),
}
"""Number of parts, rows, queries, and dtype."""


def draw(
    count: int, rows: int, queries: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[attention_join.Part], torch.Tensor]:
    """Draw parts and sinks: out token-major or not, some lse far below or above the sink."""
    torch.manual_seed(0)
    parts = []
    for n in range(count):
        out = torch.randn(rows, queries, 4, 64).to(dtype).transpose(1, 2)
        lse = 3 * torch.randn(4, rows, queries).transpose(0, 1)
        parts.append(((out if n else out.contiguous()).to(device), lse.to(device)))
    return parts, torch.tensor([0.5, -30.0, 30.0, float("-inf")], device=device)


def errors(count: int, rows: int, queries: int, dtype: torch.dtype, device: str) -> list[float]:
    """Return the errors of out and lse."""
    parts, sinks = draw(count, rows, queries, dtype, device)
    every = torch.stack([*(lse.double() for _, lse in parts)])
    ends = sinks.double()[:, None].expand_as(every[0])
    total = torch.cat([every, ends[None]]).logsumexp(0)
    exact = sum(out.double() * (lse.double() - total).exp()[..., None] for out, lse in parts)
    out, lse = attention_join.join(parts, sinks)
    assert out.data_ptr() == parts[0][0].data_ptr()
    pairs = ((out, exact), (lse, total))
    return [float((got.double() - want).norm() / want.norm()) for got, want in pairs]


if __name__ == "__main__":
    with mock.patch.object(torch.Tensor, "is_cuda", property(lambda _: True)):
        print(json.dumps({name: errors(*case, "cpu") for name, case in CASES.items()}))
