"""The masked weight and its factors' gradients: plain torch and the interpreted kernels against the
definition, and the kernels compiled for an RTX 3090."""

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparselong.kernels.dense import factor_gradients, masked_weight, masked_weight_triton
from tests.kernels.masked_weight_interpreted import (
    CASES,
    draw,
    error,
    factor_gradients_reference,
)
from tests.kernels.run_interpreted import run_interpreted
from tests.kernels.test_sm86 import LIMIT_BYTES, read_report
from tests.references.masked_weight import masked_weight_reference


def test_kernels_match_the_definition(forked_python):
    """fp32 instead of fp64 sums may change one code in a thousand. NaN, where a kernel wrote
    nothing, compares false."""
    rows = run_interpreted(forked_python, "masked_weight_interpreted")
    assert len(rows) == len(CASES)
    for row in rows:
        assert row["weight"] <= 2e-3 and row["gate"] <= 2e-3, row
        assert 0.2 < row["passing"] <= 1.0, row
        assert row["gradients"] <= max(2 * row["plain"], 3e-7), row
    assert any(row["passing"] < 0.45 for row in rows), "no case saturates"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_torch_matches_the_definition(case):
    weight = draw(case)
    rounded, passing = masked_weight_reference(**vars(weight))
    assert (weight.round() != rounded).float().mean() <= 1e-3
    again, gate = weight.round_with_gate()
    assert torch.equal(again, weight.round())
    assert (gate is None) == (weight.patterns is None and weight.scale is None)
    if gate is None:
        gate = passing
    assert gate.dtype == torch.bool and (gate != passing).float().mean() <= 1e-3
    outer = torch.randn(weight.master.shape)
    exact = factor_gradients_reference(outer, gate, weight)
    got = [each for pair in weight.factor_gradients(outer, gate) for each in pair]
    assert len(got) == 2 * case.layers
    for one, true in zip(got, exact, strict=True):
        assert one.dtype == torch.float32 and error(one, true) <= 2e-6


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


TYPES = {
    **dict.fromkeys(("result_ptr", "master_ptr", "scale_ptr"), "*bf16"),
    **{"patterns_ptr": "*u8", "gate_ptr": "*i32", "arrived_ptr": "*i32"},
    **dict.fromkeys(("scaling", "lowest", "highest"), "fp32"),
}


def check_fits_a_3090(kernel, constants: dict, warps: int, aligned: tuple[str, ...] = ()) -> None:
    """Compile for sm_86; pointers are of fp32 unless in TYPES, integers `aligned` to 16."""
    signature, properties = {}, {}
    for position, name in enumerate(kernel.arg_names):
        other = "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else TYPES.get(name, other)
        if aligned and (name.endswith("_ptr") or name in aligned):
            properties[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, properties)
    target, options = GPUTarget("cuda", 86, 32), {"num_warps": warps}
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.metadata.shared <= LIMIT_BYTES[86]
    assert read_report(compiled.asm["ptx"], 86)[1] == 0


@pytest.mark.parametrize("gate", [False, True])
def test_kernel_fits_a_3090(gate):
    constants = {"GROUP": 64, "HAS_MASK": True, "HAS_SCALE": True, "GATE": gate}
    constants |= {"ROWS": masked_weight.TILE_ROWS, "BLOCKS": masked_weight.BLOCKS}
    check_fits_a_3090(masked_weight_triton.masked_weight_kernel, constants, masked_weight.WARPS)


@pytest.mark.parametrize(
    ("gate", "aligned"),
    [
        (True, ("columns", "rank")),
        (True, ("columns",)),
        (False, ("columns", "rank")),
        (False, ("rank",)),
        (False, ("nothing",)),
    ],
    ids=str,
)
def test_gradient_kernels_fit_a_3090(gate, aligned):
    """With a gate a row is whole blocks of 32; ranks need not be multiples of 16."""
    of = factor_gradients
    blocks = of.choose_blocks(2880 if "columns" in aligned else 2881)
    constants = {"HAS_GATE": gate, "BLOCKS": blocks, **of.CONSTANTS}
    check_fits_a_3090(of.factor_gradients_kernel, constants, blocks, aligned)
