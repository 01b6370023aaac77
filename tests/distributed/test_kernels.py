"""GPU kernels on assembled keys, which they read by stride: Triton in its interpreter, flash-attn
and flash-attn-4 through stand-ins for the packages."""

import pytest

from tests.distributed import cases
from tests.distributed.pool import Pool


@pytest.fixture(scope="module")
def interpreting():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read when triton is imported
        pool = Pool(2, fresh=True)
    yield pool
    pool.close()


LAYOUTS = [
    (None, (0, 128), 1),
    (None, (0, 50, 77, 128), 2),
    (20, (0, 128), 1),
    (20, (0, 50, 77, 128), 1),
]


@pytest.mark.parametrize("window, boundaries, stride", LAYOUTS)
def test_kernels_on_shards_agree_with_plain_attention(interpreting, window, boundaries, stride):
    for errors in interpreting.run(cases.attend_by, "triton", window, boundaries, stride):
        assert max(errors) < 1e-5


@pytest.mark.parametrize("backend", ["flash_attn", "flash_attn_4"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("window, boundaries, stride", [*LAYOUTS, (50, (0, 128), 2)])
def test_packages_on_shards_are_exact_with_sinks(pools, size, window, boundaries, stride, backend):
    for errors in pools[size].run(cases.attend_by, backend, window, boundaries, stride):
        assert max(errors) < 1e-5
