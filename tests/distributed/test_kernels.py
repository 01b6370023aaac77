"""The Triton kernels on assembled keys, which they read by stride, in Triton's interpreter."""

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


@pytest.mark.parametrize(
    "window, boundaries, stride",
    [
        (None, (0, 128), 1),
        (None, (0, 50, 77, 128), 2),
        (20, (0, 128), 1),
        (20, (0, 50, 77, 128), 1),
    ],
)
def test_kernels_on_a_shard_agree_with_plain_attention_on_the_whole(
    interpreting, window, boundaries, stride
):
    for errors in interpreting.run(cases.attend_by_triton, window, boundaries, stride):
        assert max(errors) < 1e-5
