"""Which of Liger's kernels compute gpt-oss; benchmarks/liger.py measures them on a GPU."""

from tests.kernels.run_interpreted import run_interpreted


def test_ligers_rotary_serves_gpt_oss_and_its_swiglu_does_not(forked_python):
    errors = run_interpreted(forked_python, "interpreted_liger")
    assert errors["rotary"] < 1e-6  # it reads half of cos and sin, which is all that gpt-oss has
    assert errors["activation"] > 0.1
