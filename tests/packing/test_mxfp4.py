"""MXFP4: decoding of every byte at every scale, and rounding to the nearest code."""

import pytest
import torch

from sparselong.packing import mxfp4

CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def all_bytes() -> torch.Tensor:
    """Return [256, 1, 16]: row b contains byte b sixteen times."""
    return torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1).expand(256, 1, 16).contiguous()


def test_every_byte_at_every_scale_decodes_exactly():
    """All 256 bytes at all 255 scales, both nibbles, against the format's specification."""
    blocks, powers = all_bytes(), torch.arange(255, dtype=torch.float64) - 127
    values = torch.tensor([*CODES, *(-code for code in CODES)], dtype=torch.float64)
    halves = values[torch.stack([torch.arange(256) & 15, torch.arange(256) >> 4], 1)]
    # float32 represents every product except those beyond its largest power of two
    exact = (halves * torch.exp2(powers)[:, None, None]).float()
    for scale in range(255):
        scales = torch.full((256, 1), scale, dtype=torch.uint8)
        decoded = mxfp4.decode(blocks, scales, torch.float32).view(256, 16, 2)
        wanted = exact[scale][:, None].expand(256, 16, 2)
        assert torch.equal(decoded.view(torch.int32), wanted.contiguous().view(torch.int32)), scale


def test_bfloat16_is_exact_for_normal_scales():
    blocks = all_bytes()
    for scale in (2, 100, 127, 140, 252):
        scales = torch.full((256, 1), scale, dtype=torch.uint8)
        exact = mxfp4.decode(blocks, scales, torch.float64)
        assert torch.equal(mxfp4.decode(blocks, scales, torch.bfloat16).double(), exact)


def test_packed_codes_round_trip():
    blocks = torch.randint(0, 256, (5, 3, 2, 16), dtype=torch.uint8)
    assert torch.equal(mxfp4.pack_codes(mxfp4.unpack_codes(blocks)), blocks)
    assert mxfp4.unpack_codes(torch.tensor([[0x21] * 16], dtype=torch.uint8))[:2].tolist() == [1, 2]


@pytest.mark.parametrize("exponent", [-100, -20, 0, 5, 100])
def test_encode_rounds_to_the_nearest_code(exponent):
    generator = torch.Generator().manual_seed(exponent + 200)
    weight = torch.randn(64, 96, generator=generator) * 2.0**exponent
    blocks, scales = mxfp4.encode(weight)
    decoded = mxfp4.decode(blocks, scales, torch.float64).reshape(64, 3, 32)
    step = torch.exp2(scales.double() - 127).unsqueeze(-1)
    grid = torch.tensor(sorted({*CODES, *(-c for c in CODES)}), dtype=torch.float64)
    distance = (weight.double().reshape(64, 3, 32, 1) / step.unsqueeze(-1) - grid).abs()
    nearest = distance.amin(-1) * step
    assert torch.allclose((decoded - weight.double().reshape(64, 3, 32)).abs(), nearest)
    largest = weight.reshape(64, 3, 32).abs().amax(-1).double() / step.squeeze(-1)
    assert bool(((largest >= 4) & (largest < 8)).all())  # OCP: the largest is in the top binade


def test_ties_round_to_the_even_code():
    block = torch.zeros(32)
    block[:8] = torch.tensor([4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    blocks, scales = mxfp4.encode(block)
    assert scales.tolist() == [127]
    rounded = mxfp4.decode(blocks, scales, torch.float32)[:8].tolist()
    assert rounded == [4.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


def test_zeros_and_signs():
    blocks, scales = mxfp4.encode(torch.zeros(2, 32))
    assert not mxfp4.decode(blocks, scales).any()
    weight = torch.linspace(-6, 6, 64)
    positive, negative = (mxfp4.decode(*mxfp4.encode(w), torch.float32) for w in (weight, -weight))
    assert torch.equal(positive, -negative)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="divisible by 32"):
        mxfp4.encode(torch.zeros(31))
    with pytest.raises(ValueError, match="NaN"):
        mxfp4.encode(torch.full((32,), float("nan")))
    with pytest.raises(ValueError, match="NaN in E8M0"):
        mxfp4.decode(all_bytes(), torch.full((256, 1), 255, dtype=torch.uint8))
    with pytest.raises(ValueError, match="blocks must be"):
        mxfp4.decode(all_bytes(), torch.zeros(256, 2, dtype=torch.uint8))
