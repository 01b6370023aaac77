"""Sorting the gradients of assembled keys: the kernel against plain torch, on a CPU.

tests/distributed compares plain torch with one process, tests/gpu the compiled kernel with torch.
"""

import pytest

from sparselong.kernels.attention import key_gradients
from tests.kernels.key_gradients_interpreted import CASES
from tests.kernels.run_interpreted import run_interpreted
from tests.kernels.test_sm86 import LIMIT_BYTES, compile_simply


def test_kernel_matches_plain_torch(forked_python):
    found = run_interpreted(forked_python, "key_gradients_interpreted")
    assert found == dict.fromkeys(CASES, [True, True])


@pytest.mark.parametrize("arch", [86, 90])
def test_kernel_fits_each_gpu(arch):
    constants = {"KEYS": key_gradients.KEYS, "D": 64}
    assert key_gradients.WARPS == 4
    shared, spilled = compile_simply(
        key_gradients.sort_kernel, constants, ("own_ptr",), arch, others={"places_ptr": "*i32"}
    )
    assert shared <= LIMIT_BYTES[arch] and spilled == 0
