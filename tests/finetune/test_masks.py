"""Mask and scale maths by cases small enough to check by hand."""

import pytest
import torch

from sparselong.finetune.masks import (
    flipped_fraction,
    score_two_four,
    update_mask,
    update_scale,
    update_steps,
)

KEPT_02 = torch.tensor([[True, False, True, False]])


def kept(mask: torch.Tensor) -> list[int]:
    return torch.where(mask[0])[0].tolist()


# Stage 02 kept positions 0 and 2 of [1, 5, 2, 0.5]: it disagrees with magnitude by 5 - 1 = 4.
MASTER = torch.tensor([[1.0, 5.0, 2.0, 0.5]])


@pytest.mark.parametrize(
    ("weight", "criterion", "expected", "why"),
    [
        ([1.0, 5.0, 2.0, 0.5], "hysteresis", [0, 2], "nothing learned, nothing flips"),
        ([1.0, 5.0, 2.0, 0.5], "magnitude", [1, 2], "the two largest, whatever stage 02 chose"),
        ([1.0, 5.5, 2.0, 0.5], "hysteresis", [1, 2], "gained 0.5 over its old lead of 4"),
        ([1.4, 5.3, 2.0, 0.5], "hysteresis", [0, 2], "gained 0.3, the survivor gained 0.4"),
        ([0.9, 5.0, 2.0, 0.5], "hysteresis", [1, 2], "the survivor shrank by 0.1"),
        (
            [1.0, 5.0, 2.0, 5.2],
            "hysteresis",
            [2, 3],
            "5.2 - 4 = 1.2 beats 1.0: another one returns",
        ),
        ([-1.0, -5.5, 2.0, 0.5], "hysteresis", [1, 2], "signs do not matter"),
        ([1.0, 9.0, 2.0, 8.0], "hysteresis", [1, 3], "both can return"),
    ],
)
def test_which_two_stay(weight, criterion, expected, why):
    mask = update_mask(torch.tensor([weight]), MASTER, KEPT_02, KEPT_02, criterion)
    assert kept(mask) == expected, why


def test_scores_of_the_removed_are_lowered_by_the_old_disagreement():
    scores = score_two_four(MASTER, MASTER, KEPT_02, "hysteresis")
    assert torch.allclose(scores, torch.tensor([[1.0, 1.0, 2.0, -3.5]]))


def test_where_stage_02_agreed_the_rule_is_plain():
    master = torch.tensor([[5.0, 1.0, 4.0, 2.0]])
    weight = torch.tensor([[5.0, 1.0, 4.0, 4.5]])
    assert torch.equal(score_two_four(weight, master, KEPT_02, "hysteresis"), weight)
    assert kept(update_mask(weight, master, KEPT_02, KEPT_02, "hysteresis")) == [0, 3]


def test_ties_stay_as_they_are_now():
    weight = torch.full((1, 4), 3.0)
    for current in ([0, 1], [1, 3], [2, 3]):
        mask = torch.zeros(1, 4, dtype=torch.bool)
        mask[0, current] = True
        for criterion in ("hysteresis", "magnitude"):
            chosen = update_mask(weight, weight, mask, mask, criterion)
            assert torch.equal(chosen, mask)


def test_a_returned_weight_goes_again_when_its_gain_goes():
    returned = update_mask(
        torch.tensor([[1.0, 5.5, 2.0, 0.5]]), MASTER, KEPT_02, KEPT_02, "hysteresis"
    )
    back = update_mask(
        torch.tensor([[1.0, 4.9, 2.0, 0.5]]), MASTER, KEPT_02, returned, "hysteresis"
    )
    assert torch.equal(back, KEPT_02)


def test_untrained_flips_nothing_over_the_whole_range_of_bf16():
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-100, 100, (512, 256), generator=generator).float()
    master = (torch.randn(512, 256, generator=generator) * 2.0**exponents).to(torch.bfloat16)
    order = torch.rand(512 * 64, 4, generator=generator).argsort(-1)[:, :2]
    mask = torch.zeros(512 * 64, 4, dtype=torch.bool).scatter_(1, order, True).reshape(512, 256)
    chosen = update_mask(master.float(), master, mask, mask, "hysteresis")
    assert flipped_fraction(mask, chosen) == 0.0
    plain = update_mask(master.float(), master, mask, mask, "magnitude")
    assert flipped_fraction(mask, plain) > 0.2  # a random mask is far from the largest two


def test_always_exactly_two_of_four():
    generator = torch.Generator().manual_seed(1)
    master = torch.randn(64, 128, generator=generator).to(torch.bfloat16)
    mask = torch.tensor([True, True, False, False]).repeat(64, 32)
    weight = master.float() + 0.5 * torch.randn(64, 128, generator=generator)
    for criterion in ("hysteresis", "magnitude"):
        chosen = update_mask(weight, master, mask, mask, criterion)
        assert (chosen.reshape(-1, 4).sum(-1) == 2).all()


def test_scale_follows_the_largest_kept_weight():
    before = torch.tensor([[1.0, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    now = torch.tensor([[1.0, -3.0, 0.0, 0.0, 0.0, 0.75, 0.0, 0.0]])
    scale = torch.tensor([[0.25, 0.0]], dtype=torch.bfloat16)
    new = update_scale(now, before, scale, bits=4)
    assert new.dtype == torch.bfloat16
    assert new[0].tolist() == pytest.approx([0.375, 0.75 / 7.5], rel=4e-3)
    eight = update_scale(now, before, scale, bits=8)
    assert eight[0, 1].item() == pytest.approx(0.75 / 127.5, rel=4e-3)


def test_unchanged_groups_keep_their_scale_to_the_bit():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(32, 256, generator=generator)
    scale = torch.rand(32, 4, generator=generator).to(torch.bfloat16)
    assert torch.equal(update_scale(weight, weight, scale, 4), scale)


@pytest.mark.parametrize(
    ("total", "frequency", "expected"),
    [
        (20, 0.25, [5, 10, 15]),
        (60, 0.05, list(range(3, 58, 3))),
        (10, 0.05, list(range(1, 10))),  # an interval is at least one step
        (7, 0.3, [2, 4]),  # 6 would lie within the last interval
        (10, 1.0, []),
        (1, 0.5, []),
        (100, 0.0, []),
    ],
)
def test_update_steps(total, frequency, expected):
    assert update_steps(total, frequency) == expected
