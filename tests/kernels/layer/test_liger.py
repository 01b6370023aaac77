"""Which of Liger's kernels compute gpt-oss; benchmarks/liger.py measures them on a GPU."""

from tests.kernels.run_interpreted import run_interpreted


def test_ligers_rotary_serves_gpt_oss_its_norm_rounds_twice_and_its_swiglu_is_another(
    forked_python,
):
    errors = run_interpreted(forked_python, "interpreted_liger")
    assert errors["rotary"] < 1e-6  # it reads half of cos and sin, which is all that gpt-oss has
    assert errors["norm, gemma"] < 3e-4  # one rounding to fp16, as gpt-oss's
    assert errors["norm, llama"] > 1.2 * errors["norm, gemma"]  # what use_liger_kernel installs
    assert errors["activation"] > 0.1
