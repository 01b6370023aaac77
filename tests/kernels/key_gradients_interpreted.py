"""Runs the kernel that sorts key gradients in Triton's interpreter, for test_key_gradients.py.

Runs in its own process, because the interpreter must be chosen before Triton is imported. Prints
one JSON document: for each case whether both results are bit-identical to plain torch's.
"""

import os

if __name__ == "__main__":  # tests/gpu imports the cases and compiles the kernel
    os.environ["TRITON_INTERPRET"] = "1"

import json
from unittest import mock

import torch

from sparselong.kernels.attention import key_gradients
from sparselong.kernels.attention.key_gradients import RunGradients

CASES = {
    "one chunk inside the other": ((0, 40), (0, 77), 1, torch.float32),
    "overlapping chunks": ((0, 50), (30, 70), 2, torch.float32),
    "separate chunks": ((0, 33), (33, 64), 2, torch.float32),
    "half": ((0, 16), (0, 64), 1, torch.float16),
}
"""Key ranges of the query chunks, rows and dtype."""


def compare(
    first: tuple[int, int], second: tuple[int, int], rows: int, dtype: torch.dtype, device: str
) -> list[bool]:
    """Return whether other ranks' and own gradients match torch; a third of the keys are own."""
    generator = torch.Generator().manual_seed(0)
    keys = max(first[1], second[1])
    runs = []
    for begin, end in (first, second):
        shape = (rows, end - begin, 3, 64)  # the kernels' layout: tokens before heads
        dk, dv = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        dv = dv.transpose(1, 2).contiguous().transpose(1, 2)
        runs.append(RunGradients(begin, *(t.transpose(1, 2).to(device) for t in (dk, dv))))
    order = torch.randperm(keys, generator=generator, dtype=torch.int32)
    own = keys // 3
    places = torch.where(order < own, ~order, order - own).to(device)
    got = key_gradients.sort_gradients((runs[0], runs[1]), places, keys - own)
    expected = key_gradients._sort_plainly((runs[0], runs[1]), places, torch.float32)
    assert [len(t) for t in got] == [keys - own, own]
    return [torch.equal(a, b) for a, b in zip(got, expected, strict=True)]


if __name__ == "__main__":
    with mock.patch.object(torch.Tensor, "is_cuda", property(lambda _: True)):
        print(json.dumps({name: compare(*case, "cpu") for name, case in CASES.items()}))
