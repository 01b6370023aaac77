"""The sweep: plain torch against the definition, the interpreted kernel against plain torch, the
kernel compiled for an RTX 3090."""

import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparselong.kernels.sweep import sweep_columns, triton_sweep
from sparselong.packing.dense import DenseFormat
from tests.kernels.run_interpreted import run_interpreted
from tests.kernels.sweep_interpreted import CASES, Case, draw
from tests.kernels.test_sm86 import LIMIT_BYTES, read_report
from tests.references.sweep import sweep_reference

INT4 = DenseFormat(4, "2:4", 32)


def test_the_kernel_equals_plain_torch_bit_for_bit(forked_python):
    rows = run_interpreted(forked_python, "sweep_interpreted")
    assert len(rows) == len(CASES) and all("values" in row for row in rows)
    assert not any(count for row in rows for count in row.values()), rows


@pytest.mark.parametrize("case", [*CASES, Case(4, False, special=True)], ids=str)
def test_plain_torch_matches_the_definition(case):
    """A tie that fp32 rounds the other way than fp64 would change the rest of its row."""
    weight, factor = draw(case)
    swept = sweep_columns(weight, factor, case.format)
    wanted = sweep_reference(weight, factor, case.bits, case.sparse, case.group)
    values, kept, codes, scale = wanted
    assert (swept.values - values).norm() <= 1e-5 * values.norm()
    if case.sparse:
        assert torch.equal(swept.mask, kept)
    else:
        assert swept.mask is None
    if case.bits < 16:
        assert torch.equal(swept.codes.double(), codes)
        assert torch.equal(swept.scale.double(), scale)
    else:
        assert swept.codes is None and swept.scale is None


def test_the_sweep_by_hand():
    """Scale 2 / 7.5, rounded to bf16: 0.2668. Column 0 (code 7, value 1.867) passes 0.1328 on.

    All diagonals are 1, so the first four keep columns 0 and 2. Column 1 is pruned: it passes on
    what it has become, 0.5 − 0.1328 · 2 = 0.2344, to column 3, which is pruned as well.
    """
    factor = torch.eye(32)
    factor[0, 1], factor[1, 3], factor[3, 31] = 2.0, 1.0, 0.5
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([2.0, 0.5, -1.0, 0.25])
    swept = sweep_columns(weight, factor, INT4)
    step = torch.tensor(2 / 7.5).bfloat16()
    assert swept.scale is not None and swept.scale.tolist() == [[step.item()]]
    assert swept.mask is not None and swept.mask[0, :4].tolist() == [True, False, True, False]
    assert swept.codes is not None and swept.codes[0, :4].tolist() == [7, 0, -4, 0]
    first = 2.0 - (7 * step.float()).bfloat16().float()
    second = 0.5 - 2 * first
    third = 0.25 - second
    torch.testing.assert_close(swept.values[0, 1], second)
    torch.testing.assert_close(swept.values[0, 3], third)
    torch.testing.assert_close(swept.values[0, 31], -0.5 * third)


def test_the_mask_is_chosen_from_updated_weights():
    """Column 0 is pruned and passes its whole weight on, which decides the next four."""
    factor = torch.eye(32)
    factor[0, 7] = -100.0
    weight = torch.zeros(1, 32)
    weight[0, :8] = torch.tensor([0.1, 1.0, 1.0, 0.0, 3.0, 2.0, 1.0, 0.0])
    swept = sweep_columns(weight, factor, INT4)
    assert swept.mask is not None
    assert swept.mask[0, :8].tolist() == [False, True, True, False, True, False, False, True]


def test_a_large_weight_of_little_weight_saturates_to_save_the_others():
    """Row 0: with its largest weight's scale all others round to zero, 31 · 0.06² = 0.11. With half
    of it they have code 1, and the largest is 0.53 off, but its column counts a hundredth."""
    factor = torch.eye(32)
    factor[3, 3] = 10.0
    weight = torch.full((2, 32), 0.06)
    weight[0, 3], weight[1] = 1.0, torch.linspace(0.1, 1.0, 32)
    swept = sweep_columns(weight, factor, DenseFormat(4, "none", 32))
    assert swept.scale is not None and swept.codes is not None
    largest = (weight.amax(1) / 7.5).bfloat16()
    assert (
        swept.scale[0, 0] < 0.6 * largest[0] and swept.codes[0].tolist() == [1] * 3 + [7] + [1] * 28
    )
    assert swept.scale[1, 0] == largest[1]


def test_rows_are_independent():
    """Neither the CPU's blocks of rows nor a kernel's mix them."""
    case = Case(4, True, rows=300, columns=64)
    weight, factor = draw(case)
    whole = sweep_columns(weight, factor, case.format)
    alone = sweep_columns(weight[270:271].contiguous(), factor, case.format)
    for one, other in zip(whole, alone, strict=True):
        assert one is not None and other is not None and torch.equal(one[270:271], other)


@pytest.mark.parametrize(
    ("weight", "factor", "named"),
    [
        (torch.ones(2, 32), torch.eye(64), "factor: shape"),
        (torch.ones(2, 32).double(), torch.eye(32), "weight: torch.float64"),
        (torch.ones(32, 2).T, torch.eye(32), "weight: strides"),
        (torch.ones(2, 48), torch.eye(48), "weight: 2:4 requires"),
    ],
)
def test_refuses_what_does_not_fit(weight, factor, named):
    with pytest.raises(ValueError, match=named):
        sweep_columns(weight, factor, INT4)


@pytest.mark.parametrize(("sparse", "integer"), [(True, True), (True, False), (False, True)])
def test_the_kernel_fits_a_3090_and_fuses_nothing(sparse, integer):
    """A fused product and difference is rounded once, and would differ from plain torch's."""
    constants = {"GROUP": 64, "SPARSE": sparse, "INTEGER": integer, "LOWEST": -8, "HIGHEST": 7}
    constants |= {"LEAST": triton_sweep.LEAST_SCALE, "TRIED": triton_sweep.TRIED}
    constants |= {"ROWS": triton_sweep.ROWS, "WIDTH": triton_sweep.WIDTH}
    types = {"mask_ptr": "*i1", "codes_ptr": "*i8", "scale_ptr": "*bf16"}
    signature, aligned = {}, {}
    for position, name in enumerate(triton_sweep.sweep_kernel.arg_names):
        other = "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, other)
        if name not in constants:
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(triton_sweep.sweep_kernel, signature, constants, aligned)
    target = GPUTarget("cuda", 86, 32)
    compiled = triton.compile(source, target=target, options=triton_sweep.OPTIONS)
    assert compiled.metadata.shared <= LIMIT_BYTES[86]
    assert read_report(compiled.asm["ptx"], 86)[1] == 0
    assert not re.search(r"\bfma\.", compiled.asm["ptx"])
    assert compiled.metadata.enable_fp_fusion is False  # the assembler does not fuse either
