"""Merging into MXFP4: nearest sum by brute force, unchanged bytes, reported loss."""

import pytest
import torch

from sparselong.adapters.merge import merge_adapter, round_sum
from sparselong.kernels.experts.lora import Adapter
from sparselong.packing import mxfp4

EXPERTS, OUT, IN, RANK = 3, 8, 64, 2


def draw_stack() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (EXPERTS, OUT, IN // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(118, 124, (EXPERTS, OUT, IN // 32), dtype=torch.uint8)


def draw_adapter(size: float) -> Adapter:
    a = torch.randn(EXPERTS, RANK, IN)
    return Adapter(a, size * torch.randn(EXPERTS, OUT, RANK), 0.5)


def test_a_zero_adapter_keeps_every_byte():
    """Including negative zeros and blocks that another scale could represent as well."""
    blocks, scales = draw_stack()
    blocks[0, 0], blocks[0, 1] = 0x88, 0x11  # all -0, all 0.5
    merged, new_scales, rounding = merge_adapter(blocks, scales, draw_adapter(0.0))
    assert torch.equal(merged, blocks) and torch.equal(new_scales, scales)
    assert set(rounding.summarize().values()) == {0.0}


@pytest.mark.parametrize("size", [0.003, 0.1, 3.0])
def test_no_other_scale_or_code_is_nearer(size):
    blocks, scales = draw_stack()
    adapter = draw_adapter(size)
    merged, new_scales, _ = merge_adapter(blocks, scales, adapter)
    total = mxfp4.decode(blocks, scales, torch.float64)
    total = total + adapter.scaling * (adapter.b @ adapter.a).double()
    grouped = total.reshape(EXPERTS, OUT, -1, 32)
    table = torch.tensor(mxfp4.VALUES, dtype=torch.float64)
    best = torch.full(grouped.shape[:-1], float("inf"), dtype=torch.float64)
    for exponent in range(-16, 8):
        values = table * 2.0**exponent
        nearest = (grouped[..., None] - values).square().amin(-1).sum(-1)
        best = torch.minimum(best, nearest)
    stored = mxfp4.decode(merged, new_scales, torch.float64).reshape(grouped.shape)
    errors = (stored - grouped).square().sum(-1)
    # The best of three scales is optimal except in a few blocks, and never far from optimal.
    assert (errors <= 1.2 * best + 1e-12).all()
    assert (errors <= best * (1 + 1e-5) + 1e-12).float().mean() > 0.9


def test_a_change_onto_codes_is_kept_exactly():
    """In a weight of ones, one column becomes two and another minus one half."""
    codes = torch.full((1, OUT, IN), 2, dtype=torch.uint8)
    blocks, scales = mxfp4.pack_codes(codes), torch.full((1, OUT, 2), 127, dtype=torch.uint8)
    a, b = torch.zeros(1, RANK, IN), torch.ones(1, OUT, RANK)
    a[0, 0, 3], a[0, 1, 40] = 2.0, -3.0
    merged, new_scales, rounding = merge_adapter(blocks, scales, Adapter(a, b, 0.5))
    expected = torch.ones(1, OUT, IN)
    expected[..., 3], expected[..., 40] = 2.0, -0.5
    assert torch.equal(mxfp4.decode(merged, new_scales, torch.float32), expected)
    summary = rounding.summarize()
    assert summary["lost"] == 0.0 and summary["kept"] == 1.0
    assert summary["values_changed"] == 2 / IN
    assert summary["relative_change"] == pytest.approx(((1 + 2.25) / IN) ** 0.5)


def test_a_change_below_half_a_step_is_lost_and_reported():
    codes = torch.full((1, OUT, IN), 2, dtype=torch.uint8)
    blocks, scales = mxfp4.pack_codes(codes), torch.full((1, OUT, 2), 127, dtype=torch.uint8)
    # Powers of two apart, so that no scale gives finer steps for the whole block.
    blocks[..., 0] = 0x77
    a, b = torch.zeros(1, RANK, IN), torch.ones(1, OUT, RANK)
    a[0, 0, 5:10] = 0.1
    merged, new_scales, rounding = merge_adapter(blocks, scales, Adapter(a, b, 1.0))
    assert torch.equal(merged, blocks) and torch.equal(new_scales, scales)
    summary = rounding.summarize()
    assert summary["lost"] == 1.0 and summary["kept"] == 0.0 == summary["values_changed"]


def test_a_sum_beyond_the_stored_scale_gets_a_larger_one():
    codes = torch.full((1, 32), 7, dtype=torch.uint8)
    total = mxfp4.decode(mxfp4.pack_codes(codes), torch.full((1, 1), 127, dtype=torch.uint8)) * 8
    blocks, scales = round_sum(total.float(), torch.full((1, 1), 127, dtype=torch.uint8))
    assert scales.item() == 130 and torch.equal(mxfp4.decode(blocks, scales), total)
