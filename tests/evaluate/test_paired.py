"""Paired comparisons, by hand."""

import math

import pytest

from sparselong.evaluate import paired


def test_flips_and_difference_by_hand():
    """Differences 0, -1, 1, 1: mean 1/4, variance (1/16 + 25/16 + 9/16 + 9/16) / 3 = 11/12."""
    result = paired.compare_answers([1, 1, 0, 0], [1, 0, 1, 1])
    assert (result["gained"], result["lost"], result["difference"]) == (2, 1, 0.25)
    assert result["stderr"] == pytest.approx(math.sqrt(11 / 12 / 4))
    assert result["p"] == 1.0


def test_paired_error_is_smaller_than_that_of_two_separate_accuracies():
    base = [1] * 50 + [0] * 50
    other = [1] * 52 + [0] * 48
    separate = math.sqrt(2 * 0.25 / 100)
    assert paired.compare_answers(base, other)["stderr"] < separate / 4
    assert paired.compare_answers(base, base)["stderr"] == 0


def test_mcnemar_by_hand():
    assert paired.mcnemar_exact_p(0, 0) == 1.0
    assert paired.mcnemar_exact_p(8, 1) == 2 * (1 + 9) / 512
    assert paired.mcnemar_exact_p(1, 8) == 2 * (1 + 9) / 512
    assert paired.mcnemar_exact_p(5, 5) == 1.0
    assert paired.mcnemar_exact_p(0, 6) == 2 / 64


def test_answers_to_different_items_are_refused():
    with pytest.raises(ValueError, match="not 2 and 3"):
        paired.compare_answers([1, 0], [1, 0, 1])


def test_losses_by_hand():
    """One nat more on each of two conversations (2 and 4 tokens): residuals +1/3 and -1/3."""
    result = paired.compare_losses([(2.0, 2), (6.0, 4)], [(3.0, 2), (7.0, 4)])
    assert result["difference"] == pytest.approx(1 / 3)
    assert result["ratio"] == pytest.approx(math.exp(1 / 3))
    assert result["stderr"] == pytest.approx(math.sqrt(2 * 2 / 9) / 6)


def test_losses_on_different_tokens_are_refused():
    with pytest.raises(ValueError, match="different tokens"):
        paired.compare_losses([(2.0, 2), (6.0, 4)], [(3.0, 2), (7.0, 5)])
