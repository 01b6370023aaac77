"""The accumulated Hessian against a direct computation, and its refusals."""

import pytest
import torch

from sparselong.compress.weights.hessian import Hessian
from sparselong.errors import StageError

WIDTH = 24


def _inputs(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))


def test_equals_two_over_tokens_times_the_second_moment() -> None:
    sequences = [_inputs(7).bfloat16(), _inputs(50).bfloat16()[None], _inputs(12)]
    hessian = Hessian(WIDTH, "layer")
    for sequence in sequences:
        hessian.add(sequence)
    rows = torch.cat([sequence.double().reshape(-1, WIDTH) for sequence in sequences])
    assert hessian.tokens == 69
    assert hessian.matrix.dtype == torch.float32
    torch.testing.assert_close(
        hessian.matrix.double(), 2 / 69 * rows.T @ rows, rtol=1e-5, atol=1e-6
    )


def test_does_not_depend_on_how_tokens_are_split() -> None:
    rows = _inputs(60)
    whole, parts = Hessian(WIDTH, "layer"), Hessian(WIDTH, "layer")
    whole.add(rows)
    for part in rows.split([1, 9, 50]):
        parts.add(part)
    torch.testing.assert_close(parts.matrix, whole.matrix, rtol=1e-5, atol=1e-6)


def test_does_not_depend_on_the_order_of_parts_in_a_single_bit() -> None:
    """Nor on the processes that add them: fp32 sums of the same parts differ."""
    parts = [_inputs(40 + n) * 10.0 ** (n % 4) for n in range(32)]
    orders = [range(32), range(31, -1, -1), [*range(0, 32, 2), *range(1, 32, 2)]]
    matrices, plain = [], []
    for order in orders:
        hessian, total = Hessian(WIDTH, "layer"), torch.zeros(WIDTH, WIDTH)
        for n in order:
            hessian.add(parts[n])
            total += parts[n].T @ parts[n]
        matrices.append(hessian.matrix)
        plain.append(total)
    assert all(torch.equal(matrix, matrices[0]) for matrix in matrices)
    assert not all(torch.equal(total, plain[0]) for total in plain)


def test_refuses_inputs_whose_squares_overflow() -> None:
    with pytest.raises(StageError, match="finite squares") as failure:
        Hessian(WIDTH, "layer").add(torch.full((3, WIDTH), 1e20))
    assert "1e+20" in failure.value.found


def test_differs_from_llmcompressor_by_a_constant_only() -> None:
    from llmcompressor.modifiers.gptq.helpers import accumulate_hessian

    batch = _inputs(40).reshape(4, 10, WIDTH)
    linear = torch.nn.Linear(WIDTH, 1, bias=False)
    total, sequences = accumulate_hessian(batch, linear, torch.zeros(WIDTH, WIDTH), torch.zeros(()))
    hessian = Hessian(WIDTH, "layer")
    hessian.add(batch)
    torch.testing.assert_close(hessian.matrix * 10, total / sequences, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_refuses_inputs_that_are_not_finite(poison: float) -> None:
    hessian = Hessian(WIDTH, "model.layers.3.self_attn.q_proj")
    hessian.add(_inputs(5))
    before = hessian.matrix.clone()
    poisoned = _inputs(8)
    poisoned[2, 3] = poisoned[6, 0] = poisoned[6, 1] = poison
    with pytest.raises(StageError) as failure:
        hessian.add(poisoned)
    assert "model.layers.3.self_attn.q_proj" in failure.value.what
    assert "2 of 8 tokens" in failure.value.found
    assert torch.equal(hessian.matrix, before) and hessian.tokens == 5


@pytest.mark.parametrize("shape", [(0, WIDTH), (3, WIDTH + 1)])
def test_refuses_inputs_of_the_wrong_shape(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="layer: inputs"):
        Hessian(WIDTH, "layer").add(torch.zeros(shape))
