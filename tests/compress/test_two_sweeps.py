"""The solver `llmcompressor` against llmcompressor itself and direct arithmetic."""

import pytest
import torch

from sparselong.compress.weights import two_sweeps
from sparselong.compress.weights.factor import factorize
from sparselong.compress.weights.solver import Compressed, compress_weight
from sparselong.packing import integer
from sparselong.packing.dense import DenseFormat
from tests.compress.conftest import DAMPENING


def _compress(weight: torch.Tensor, hessian: torch.Tensor, fmt: DenseFormat) -> Compressed:
    return compress_weight(weight, hessian, fmt, DAMPENING, "layer", "llmcompressor")


def _quantize_with_llmcompressor(
    weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, bits: int, group_size: int
) -> torch.Tensor:
    """Return llmcompressor's GPTQ result with our scales: bf16 values in fp32 [out, in]."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group_size
    )
    quantized, _, fell_back = quantize_weight(
        weight.float().clone()[None],
        hessian.clone()[None],
        scale[None],
        torch.zeros_like(scale[None]),
        None,
        args,
        blocksize=two_sweeps.BLOCK_COLUMNS,
        percdamp=DAMPENING,
    )
    assert not fell_back.any()
    return quantized[0]


def test_without_the_mask_the_same_loop_breaks_two_four(
    weight: torch.Tensor, hessian: torch.Tensor
) -> None:
    """Unmasked, both llmcompressor and our loop break 2:4 groups, so the update is masked."""
    _, factor = factorize(weight, hessian, DAMPENING, "layer")
    pruned, mask = two_sweeps.prune_two_four(weight, hessian, DAMPENING)
    scale = two_sweeps.choose_scale(pruned, 4, 64)
    unmasked, _ = two_sweeps.quantize_masked(pruned, factor, scale, 4, None)
    plain = _quantize_with_llmcompressor(pruned, hessian, scale, 4, 64)
    for codes in (unmasked, plain):
        conforming = ((codes != 0).reshape(-1, 4).sum(-1) <= 2).float().mean()
        assert conforming < 0.99
    masked, _ = two_sweeps.quantize_masked(pruned, factor, scale, 4, mask)
    assert ((masked != 0).reshape(-1, 4).sum(-1) <= 2).all()


def test_mask_and_kept_weights_match_sparsegpt(weight: torch.Tensor, hessian: torch.Tensor) -> None:
    pruned, mask = two_sweeps.prune_two_four(weight, hessian, DAMPENING)
    assert torch.equal(mask, pruned != 0)
    result = _compress(weight, hessian, DenseFormat(16, "2:4", 64))
    assert torch.equal(result.codes, pruned.bfloat16())
    assert not torch.equal(result.codes[mask], weight[mask])
    assert torch.equal(result.master[mask], result.codes[mask])


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (4, 32), (8, 64)])
def test_dense_quantization_equals_llmcompressor(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, group_size: int
) -> None:
    """Equal up to one code in a thousand, since sums over a block may be ordered differently."""
    result = _compress(weight, hessian, DenseFormat(bits, "none", group_size))
    assert result.mask is None and result.scale is not None
    theirs = _quantize_with_llmcompressor(weight, hessian, result.scale, bits, group_size)
    assert (result.weight().float() == theirs).float().mean() >= 0.999
    rounded = integer.quantize(weight, result.scale, bits)
    assert (result.codes != rounded).float().mean() > 0.02, "GPTQ changed almost nothing here"


@pytest.mark.parametrize(("bits", "half_range"), [(4, 7.5), (8, 127.5)])
def test_scales_by_hand(bits: int, half_range: float) -> None:
    """One ordinary group, one of zeros, one whose scale is too small for bf16."""
    weight = torch.zeros(1, 96)
    weight[0, [3, 7]] = torch.tensor([0.5, -0.75])
    weight[0, 80] = 1e-41
    scale = two_sweeps.choose_scale(weight, bits, 32)
    assert scale.dtype == torch.bfloat16 and (scale > 0).all()
    assert scale[0, 0] == torch.tensor(0.75 / half_range).bfloat16()


def test_masked_update_by_hand() -> None:
    """Scale 1, the row 1.4, 0 (pruned), 2.4, 0.8, and a factor of round values.

    Column 0: code 1, error 0.4/2 = 0.2; column 1 is unchanged, column 2 becomes 2.4 − 0.2·4 =
    1.6, column 3 0.8 − 0.2·1 = 0.6. Column 2: code 2, error −0.4/1 = −0.4; column 3 becomes
    0.6 + 0.4·2 = 1.4. Column 3: code 1. Unmasked, column 1 would become −0.2·5 = −1.
    """
    factor = torch.tensor(
        [[2.0, 5.0, 4.0, 1.0], [0.0, 1.0, 7.0, 7.0], [0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 1.0]]
    )
    weight = torch.tensor([[1.4, 0.0, 2.4, 0.8]])
    mask = torch.tensor([[True, False, True, True]])
    scale = torch.ones(1, 1, dtype=torch.bfloat16)
    codes, rounded = two_sweeps.quantize_masked(weight, factor, scale, 4, mask)
    assert codes.tolist() == [[1, 0, 2, 1]]
    torch.testing.assert_close(rounded, torch.tensor([[1.4, 0.0, 1.6, 1.4]]))
    unmasked, _ = two_sweeps.quantize_masked(weight, factor, scale, 4, None)
    assert unmasked[0, 1] == -1


def test_errors_reach_later_blocks_of_kept_columns_only() -> None:
    """The first column's error, 0.4/1, must reach the next block with the second update."""
    columns = two_sweeps.BLOCK_COLUMNS + 4
    factor = torch.eye(columns)
    factor[0, -4:] = 1.0
    weight = torch.zeros(1, columns)
    weight[0, 0] = 1.4
    mask = torch.ones(1, columns, dtype=torch.bool)
    mask[0, -2:] = False
    scale = torch.ones(1, 1, dtype=torch.bfloat16)
    _, rounded = two_sweeps.quantize_masked(weight, factor, scale, 4, mask)
    torch.testing.assert_close(rounded[0, -4:], torch.tensor([-0.4, -0.4, 0.0, 0.0]))
