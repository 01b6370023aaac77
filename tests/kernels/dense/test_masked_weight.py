"""The masked weight: plain torch and the interpreted kernel against the definition, and the
kernel compiled for an RTX 3090."""

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparselong.kernels.dense import masked_weight
from tests.kernels.masked_weight_interpreted import CASES, draw
from tests.kernels.run_interpreted import run_interpreted
from tests.kernels.test_sm86 import LIMIT_BYTES, read_report
from tests.references.masked_weight import masked_weight_reference


def test_kernel_matches_the_definition(forked_python):
    """fp32 instead of fp64 sums may change one code in a thousand."""
    rows = run_interpreted(forked_python, "masked_weight_interpreted")
    assert len(rows) == len(CASES)
    for row in rows:
        assert row["weight"] <= 2e-3 and row["gate"] <= 2e-3, row
        assert 0.2 < row["passing"] <= 1.0, row
    assert any(row["passing"] < 0.45 for row in rows), "no case saturates"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_torch_matches_the_definition(case):
    weight = draw(case)
    rounded, passing = masked_weight_reference(**vars(weight))
    assert (weight.round() != rounded).float().mean() <= 1e-3
    upstream = torch.randn(weight.master.shape)
    gated = weight.gate_(upstream.clone())
    assert (gated != weight.scaling * upstream * passing).float().mean() <= 1e-3


def test_the_definition_by_hand():
    """One row of 32: pattern 4 keeps the second and fourth of four; 4 bits saturate at 7."""
    master = torch.tensor([[1.0, 1.2, 1.0, 0.7] + [40.0, -40.0, 40.0, 40.0] * 7])
    word = sum(4 << shift for shift in range(0, 24, 3))
    patterns = torch.tensor([[word & 255, word >> 8 & 255, word >> 16]], dtype=torch.uint8)
    a, b = torch.ones(1, 32), torch.tensor([[0.1]])
    rest = (None, torch.tensor([[0.5]]), 4)
    dense, _ = masked_weight_reference(master, a, b, 2.0, *rest)
    assert dense[0, :6].tolist() == [1.0, 1.5, 1.0, 1.0, 3.5, -4.0]  # 2.4 → 2, 2.8 → 3, 1.8 → 2
    sparse, passing = masked_weight_reference(master, a, b, 2.0, patterns, *rest[1:])
    assert sparse[0, :6].tolist() == [0.0, 1.5, 0.0, 1.0, 0.0, -4.0]
    assert passing[0, :6].tolist() == [False, True, False, True, False, False]


@pytest.mark.parametrize("gate", [False, True])
def test_kernel_fits_a_3090(gate):
    types = {
        "result_ptr": "*fp32" if gate else "*bf16",
        "master_ptr": "*bf16",
        "scale_ptr": "*bf16",
    }
    types |= dict.fromkeys((f"{n}_ptr" for n in ("a", "b", "a2", "b2", "a3", "b3")), "*fp32")
    types["patterns_ptr"] = "*u8"
    types |= dict.fromkeys(("scaling", "lowest", "highest"), "fp32")
    constants = {"GROUP": 64, "HAS_MASK": True, "HAS_SCALE": True, "GATE": gate}
    constants |= {"ROWS": masked_weight.TILE_ROWS, "BLOCKS": masked_weight.BLOCKS}
    names = masked_weight.masked_weight_kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    source = ASTSource(masked_weight.masked_weight_kernel, signature, constants)
    options = {"num_warps": masked_weight.WARPS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 86, 32), options=options)
    assert compiled.metadata.shared <= LIMIT_BYTES[86]
    assert read_report(compiled.asm["ptx"], 86)[1] == 0
