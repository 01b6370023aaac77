"""Gradients of assembled keys by where they belong; tests/distributed holds plain torch's to one
process's, tests/gpu the compiled kernel to plain torch's."""

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparselong.kernels import key_gradients
from tests.kernels.key_gradients_interpreted import CASES
from tests.kernels.run_interpreted import run_interpreted
from tests.kernels.test_sm86 import LIMIT_BYTES, read_report


def test_the_kernel_gives_what_plain_torch_gives():
    assert run_interpreted("key_gradients_interpreted") == dict.fromkeys(CASES, [True, True])


@pytest.mark.parametrize("arch", [86, 90])
def test_a_3090_holds_the_kernel(arch):
    kernel = key_gradients.sort_kernel
    constants = {"KEYS": key_gradients.KEYS, "D": 64}
    types = {"own_ptr": "*fp32", "places_ptr": "*i32"}
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants)
    options = {"num_warps": key_gradients.WARPS}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert compiled.metadata.shared <= LIMIT_BYTES[arch]
    assert read_report(compiled.asm["ptx"], arch)[1] == 0
