"""The factor of the inverse Hessian: llmcompressor's bits, dead channels, adversarial Hessians."""

import pytest
import torch

from sparselong.compress.weights.factor import factorize, make_up
from sparselong.compress.weights.solver import compress_weight
from sparselong.errors import StageError
from sparselong.packing import DenseFormat
from tests.compress.conftest import DAMPENING, IN, draw

FORMAT = DenseFormat(4, "2:4", 64)


def test_equals_llmcompressors_factor_bit_for_bit(weight, hessian):
    from llmcompressor.modifiers.gptq.helpers import factorize_hessian

    solved, factor = weight.float().clone()[None], hessian.clone()[None]
    factorize_hessian(solved, factor, DAMPENING, torch.zeros(1, dtype=torch.bool))
    ours = factorize(weight, hessian, DAMPENING, "layer")
    assert torch.equal(ours[0], solved[0]) and torch.equal(ours[1], factor[0])


def test_is_the_factor_of_the_inverse(weight, hessian):
    _, factor = factorize(weight, hessian, DAMPENING, "layer")
    dampened = hessian.double()
    dampened += DAMPENING * hessian.diagonal().mean().double() * torch.eye(IN)
    product = factor.double().T @ factor.double() @ dampened
    torch.testing.assert_close(product, torch.eye(IN, dtype=torch.float64), rtol=0, atol=1e-3)
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize("dead", [[], [3, 64, 65, 66, 67, 319], list(range(0, 320, 2))])
def test_dead_channels_do_not_make_the_result_depend_on_the_scale(weight, inputs, dead):
    """A power of two is exact, so the same codes, masks and masters must come out."""
    rows = inputs.clone()
    rows[:, dead] = 0
    hessian = 2 / len(rows) * rows.T @ rows
    large, small = (
        compress_weight(weight, hessian * scale, FORMAT, DAMPENING, "layer")
        for scale in (1.0, 2.0**-30)
    )
    assert torch.equal(large.codes, small.codes) and torch.equal(large.master, small.master)
    assert large.relative_error == pytest.approx(small.relative_error)
    assert not large.codes[:, dead].any()
    assert 0 < large.relative_error < 0.5


ADVERSARIAL = {
    "one direction": lambda rows: rows[:, :1] @ rows[:1],
    "fewer tokens than inputs": lambda rows: rows[:5],
    "two huge outliers": lambda rows: rows * torch.where(torch.arange(IN) % 200 == 7, 1e6, 1.0),
    "scales over twelve decades": lambda rows: rows * torch.logspace(-6, 6, IN),
    "equal inputs": lambda rows: rows[:, :1].expand(-1, IN),
    "a single live channel": lambda rows: rows * (torch.arange(IN) == 9),
}


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_default_dampening_suffices_for_any_activations(weight, inputs, case):
    rows = ADVERSARIAL[case](inputs)
    hessian = (2 / len(rows) * rows.double().T @ rows.double()).float()
    made = compress_weight(weight, hessian, FORMAT, DAMPENING, "layer")
    assert torch.isfinite(made.weight()).all() and made.relative_error < 1
    assert torch.equal(made.mask.reshape(-1, 4).sum(-1), torch.full((weight.numel() // 4,), 2))


def test_what_is_not_positive_definite_is_refused_by_name(weight):
    basis, _ = torch.linalg.qr(draw(IN, IN, seed=9))
    indefinite = basis @ torch.diag(torch.linspace(-1, 1, IN)) @ basis.T
    with pytest.raises(StageError) as failure:
        factorize(weight, indefinite.abs() + indefinite, 1e-6, "model.layers.7.self_attn.o_proj")
    assert "model.layers.7.self_attn.o_proj" in failure.value.what
    assert "eigenvalues from -" in failure.value.found
    assert "more calibration samples, or raise calibration.dampening" in failure.value.fix


@pytest.mark.parametrize(("value", "found"), [(0.0, "a diagonal of zeros"), (torch.nan, "NaN")])
def test_making_up_needs_a_hessian_as_solving_does(weight, value, found):
    """Values that are all zero leave o_proj without inputs: no dampening helps."""
    hessian = torch.full((IN, IN), value)
    with pytest.raises(StageError, match="Hessian of o_proj is unusable") as failure:
        make_up(weight, hessian, torch.zeros(IN, IN), DAMPENING, "o_proj")
    assert found in failure.value.found
