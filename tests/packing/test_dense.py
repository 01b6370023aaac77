"""2:4 patterns, integer codes and the stored form of a dense projection."""

import itertools

import pytest
import torch

from sparselong.packing import dense, integer, two_four
from sparselong.packing.dense import DenseFormat


def random_mask(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    order = torch.rand(rows * columns // 4, 4, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(rows * columns // 4, 4, dtype=torch.bool)
    return mask.scatter_(1, order.argsort(1)[:, :2], True).reshape(rows, columns)


def test_every_pair_of_patterns_round_trips():
    pairs = list(itertools.product(two_four.PATTERNS, repeat=2))
    mask = torch.zeros(len(pairs), 8, 4, dtype=torch.bool)
    for row, (first, last) in enumerate(pairs):
        mask[row, :, :2] = True
        mask[row, 2] = mask[row, 7] = False
        mask[row, 2, list(first)] = True
        mask[row, 7, list(last)] = True
    mask = mask.reshape(len(pairs), 32)
    packed = two_four.pack_mask(mask)
    assert packed.shape == (36, 3) and packed.dtype == torch.uint8
    assert torch.equal(two_four.unpack_mask(packed), mask)


def test_the_first_pattern_is_in_the_lowest_bits():
    mask = torch.tensor([[True, True, False, False]] * 7 + [[False, False, True, True]])
    assert two_four.pack_mask(mask.reshape(1, 32)).tolist() == [[0, 0, 5 << 5]]


def test_gather_and_scatter_are_inverses():
    mask = random_mask(6, 64)
    values = torch.arange(6 * 64).reshape(6, 64)
    kept = two_four.gather_kept(values, mask)
    assert kept.shape == (6, 32)
    assert torch.equal(two_four.scatter_kept(kept, mask), values * mask)


def test_conforming_counts_nonzeros():
    weights = torch.tensor([[1, 0, 0, 2, 0, 0, 0, 0, 1, 1, 1, 0]])
    assert two_four.is_two_four(weights != 0).tolist() == [[True, True, False]]


def test_damaged_masks_are_refused():
    with pytest.raises(ValueError, match="exactly two"):
        two_four.pack_mask(torch.ones(1, 32, dtype=torch.bool))
    with pytest.raises(ValueError, match="above 5"):
        two_four.unpack_mask(torch.full((1, 3), 255, dtype=torch.uint8))
    with pytest.raises(ValueError, match="divisible by 32"):
        two_four.pack_mask(torch.ones(1, 16, dtype=torch.bool))


def test_nibbles_round_trip_over_all_pairs():
    codes = torch.tensor(list(itertools.product(range(-8, 8), repeat=2)), dtype=torch.int8)
    packed = integer.pack_nibbles(codes)
    assert torch.equal(packed.flatten().sort().values, torch.arange(256, dtype=torch.uint8))
    assert torch.equal(integer.unpack_nibbles(packed), codes)
    assert integer.pack_nibbles(torch.tensor([[1, -1]], dtype=torch.int8)).tolist() == [[0xF1]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("exponent", [-60, -8, 0, 30])
def test_every_code_survives_dequantize_and_quantize(bits, exponent):
    """quantize(dequantize(codes)) == codes for all codes and scale mantissas."""
    lowest, highest = integer.code_range(bits)
    codes = torch.arange(lowest, highest + 1, dtype=torch.int8).repeat(32, 1)
    mantissas = torch.linspace(1.0, 1.99, 32).reshape(32, 1)
    scale = (mantissas * 2.0**exponent).bfloat16()
    weight = integer.dequantize(codes, scale)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(integer.quantize(weight, scale, bits), codes)


def test_quantize_rounds_ties_to_even_and_saturates():
    scale = torch.ones(1, 1, dtype=torch.bfloat16)
    weight = torch.tensor([[0.5, 1.5, -0.5, 2.5, 7.6, 99.0, -8.4, -99.0]])
    assert integer.quantize(weight, scale, 4).tolist() == [[0, 2, 0, 2, 7, 7, -8, -8]]
    assert not integer.quantize(weight, torch.zeros(1, 1), 4)[0, 0]


@pytest.mark.parametrize(
    ("bits", "sparsity", "group", "bits_per_weight"),
    [  # by hand: kept·bits + 0.75 for patterns + 16/group for scales
        (4, "2:4", 64, 3.0),
        (4, "2:4", 32, 3.25),
        (4, "none", 64, 4.25),
        (8, "2:4", 64, 5.0),
        (8, "none", 64, 8.25),
        (16, "2:4", 64, 8.75),
        (16, "none", 64, 16.0),
    ],
)
def test_stored_form_round_trips_at_the_expected_size(bits, sparsity, group, bits_per_weight):
    fmt = DenseFormat(bits, sparsity, group)
    rows, columns = 24, 192
    generator = torch.Generator().manual_seed(bits)
    mask = random_mask(rows, columns) if fmt.is_sparse else None
    scale = None
    if fmt.is_quantized:
        lowest, highest = integer.code_range(bits)
        values = torch.randint(lowest, highest + 1, (rows, columns), generator=generator).to(
            torch.int8
        )
        scale = torch.rand(rows, columns // group, generator=generator).bfloat16()
    else:
        values = torch.randn(rows, columns, generator=generator).bfloat16()
    stored = dense.pack(fmt, values, mask, scale)
    assert sum(t.nbytes for t in stored.values()) * 8 / (rows * columns) == bits_per_weight
    assert fmt.bits_per_weight == bits_per_weight
    expected = values if mask is None else torch.where(mask, values, torch.zeros_like(values))
    assert torch.equal(dense.unpack_values(fmt, stored), expected)
    empty = fmt.empty(rows, columns)
    assert {n: (t.shape, t.dtype) for n, t in empty.items()} == {
        n: (t.shape, t.dtype) for n, t in stored.items()
    }
    weight = dense.unpack(fmt, stored)
    assert weight.dtype == torch.bfloat16
    if scale is not None:
        product = expected.float() * scale.float().repeat_interleave(group, 1)
        assert torch.equal(weight, product.bfloat16())


def test_invalid_formats_are_refused():
    with pytest.raises(ValueError, match="group size"):
        DenseFormat(4, "none", 64).check("q", 96)
    with pytest.raises(ValueError, match="divisible by 32"):
        DenseFormat(16, "2:4", 64).check("q", 48)
    with pytest.raises(ValueError, match="mask"):
        dense.pack(DenseFormat(4, "2:4", 64), torch.zeros(1, 64, dtype=torch.int8))
    with pytest.raises(ValueError, match="bf16 scales"):
        dense.pack(DenseFormat(4, "none", 64), torch.zeros(1, 64, dtype=torch.int8))
