"""The masked weight's kernel: in Triton's interpreter against plain torch, and for an RTX 3090."""

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparselong.kernels.dense import masked_weight
from tests.kernels.run_interpreted import run_interpreted
from tests.kernels.test_sm86 import LIMIT_BYTES, read_report


def test_the_kernel_gives_what_plain_torch_gives():
    """Only the order of the sum over the rank may differ, which moves a code in a thousand."""
    rows = run_interpreted("masked_weight_interpreted")
    assert len(rows) == 14
    for row in rows:
        assert row["weight"] <= 2e-3 and row["gate"] <= 2e-3, row
        assert 0.2 < row["passing"] <= 1.0, row
    assert any(row["passing"] < 0.45 for row in rows), "no case saturates"


@pytest.mark.parametrize("gate", [False, True])
def test_a_3090_holds_the_kernel(gate):
    types = {"result_ptr": "*fp32" if gate else "*bf16", "master_ptr": "*bf16", "a_ptr": "*fp32"}
    types |= {"b_ptr": "*fp32", "patterns_ptr": "*u8", "scale_ptr": "*bf16"}
    types |= dict.fromkeys(("scaling", "lowest", "highest"), "fp32")
    constants = {"GROUP": 64, "HAS_MASK": True, "HAS_SCALE": True, "GATE": gate}
    constants |= {"ROWS": masked_weight.ROWS, "BLOCKS": masked_weight.BLOCKS}
    names = masked_weight.masked_weight_kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    source = ASTSource(masked_weight.masked_weight_kernel, signature, constants)
    options = {"num_warps": masked_weight.WARPS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 86, 32), options=options)
    assert compiled.metadata.shared <= LIMIT_BYTES[86]
    assert read_report(compiled.asm["ptx"], 86)[1] == 0
