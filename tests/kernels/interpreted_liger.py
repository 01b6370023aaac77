"""Runs Liger's kernels in Triton's interpreter; layer/test_liger.py starts it.

Prints one JSON document: the relative L2 errors of each against gpt-oss's definition.
The norm calls libdevice, which the interpreter lacks: benchmarks/liger.py measures it on a GPU.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import json

import torch
from liger_kernel.ops.rope import LigerRopeFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction

from tests.references.rotary import rotate_reference


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def main() -> None:
    torch.manual_seed(0)
    found = {}
    q, k = (torch.randn(2, 5, heads, 64).transpose(1, 2) for heads in (4, 2))
    angle = torch.rand(2, 5, 32) * 100
    cos, sin = 1.3466 * angle.cos(), 1.3466 * angle.sin()
    wanted = rotate_reference(q, k, cos, sin)
    got = LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin)
    found["rotary"] = max(map(error, got, wanted))
    gate, up = 3 * torch.randn(2, 8, 96)
    clamped = gate.clamp(max=7.0)
    wanted = (up.clamp(-7.0, 7.0) + 1) * clamped * torch.sigmoid(1.702 * clamped)
    found["activation"] = error(LigerSiLUMulFunction.apply(gate, up), wanted)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
