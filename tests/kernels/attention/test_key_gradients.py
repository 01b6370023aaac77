"""Gradients of assembled keys by where they belong; tests/distributed holds plain torch's to one
process's, tests/gpu the compiled kernel to plain torch's."""

import pytest

from sparselong.kernels.attention import key_gradients
from tests.kernels.key_gradients_interpreted import CASES
from tests.kernels.run_interpreted import run_interpreted
from tests.kernels.test_sm86 import LIMIT_BYTES, compile_simply


def test_the_kernel_gives_what_plain_torch_gives():
    assert run_interpreted("key_gradients_interpreted") == dict.fromkeys(CASES, [True, True])


@pytest.mark.parametrize("arch", [86, 90])
def test_gpus_hold_the_kernel(arch):
    constants = {"KEYS": key_gradients.KEYS, "D": 64}
    assert key_gradients.WARPS == 4
    shared, spilled = compile_simply(
        key_gradients.sort_kernel, constants, ("own_ptr",), arch, others={"places_ptr": "*i32"}
    )
    assert shared <= LIMIT_BYTES[arch] and spilled == 0
