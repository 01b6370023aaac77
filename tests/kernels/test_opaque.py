"""Operators of torch.compile's against the direct calls, on the GPU's path."""

from tests.kernels.run_interpreted import run_interpreted

SUBJECTS = {"norm": 3, "rotate": 4, "router": 2, "experts": 9, "attention": 6}


def test_operators_give_the_results_and_gradients_of_direct_calls(forked_python):
    """NaN compares false, so an element that nothing wrote also fails."""
    found = run_interpreted(forked_python, "opaque_interpreted")
    assert {name: len(errors) for name, errors in found.items()} == SUBJECTS
    for name, errors in found.items():
        limit = 1e-6 if name == "attention" else 0  # another backend; the others' bits are equal
        assert all(error <= limit for error in errors), (name, errors)
