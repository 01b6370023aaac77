"""What layers keep depends on the GPU's available memory and is equal on all ranks."""

import pytest
import torch

from sparselong import memory
from sparselong.config.schema import load
from sparselong.finetune import keeping
from sparselong.memory import placing
from tests.conftest import ROOT

GIB = 2**30


KEYS = ("keep_attention", "keep_experts")


def decide(asked: str, size: int) -> keeping.Keeping:
    return keeping.decide_keeping({KEYS[0]: asked}, {KEYS[0]: size}, {})[KEYS[0]]


@pytest.fixture
def card(monkeypatch):
    """A 24 GiB GPU with 10 GiB free and 13 GiB reserved by this process."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 13 * GIB)
    return 23 * GIB + memory.CONTEXT_BYTES


def test_auto_keeps_what_fits_with_the_margin(card):
    fits = decide("auto", int(card / placing.MARGIN) - 1)
    assert fits.kept and fits.available_bytes == card and "kept; predicted" in str(fits)
    tight = decide("auto", int(card / placing.MARGIN) + 1)
    assert not tight.kept and "recomputed; predicted" in str(tight)


@pytest.mark.parametrize(("asked", "kept"), [("always", True), ("never", False)])
def test_always_and_never_are_followed(card, asked, kept):
    assert all(decide(asked, size).kept is kept for size in (1, 100 * GIB))


def test_the_rank_with_the_least_memory_decides(card, monkeypatch):
    monkeypatch.setattr(keeping.ranks, "collect", lambda own: [own, 8 * GIB, own])
    made = decide("auto", 9 * GIB)
    assert not made.kept and made.available_bytes == 8 * GIB


def test_each_key_has_its_own_peak_and_memory_is_queried_once(card, monkeypatch):
    asked = []
    monkeypatch.setattr(keeping.ranks, "collect", lambda own: asked.append(own) or [own])
    peaks = dict(zip(KEYS, (20 * GIB, 24 * GIB), strict=True))
    made = keeping.decide_keeping(dict.fromkeys(KEYS, "auto"), peaks, {})
    assert [made[key].kept for key in KEYS] == [True, False]
    assert [made[key].predicted_peak_bytes for key in KEYS] == list(peaks.values())
    assert asked == [card]


@pytest.mark.parametrize(
    ("device", "override", "why"),
    [
        ("cpu", "training.gradient_checkpointing=true", "no GPU"),
        ("cuda", "training.gradient_checkpointing=false", "gradient_checkpointing is false"),
    ],
)
def test_if_nothing_can_be_kept_the_decision_says_why(card, device, override, why):
    """Although memory is available, nothing is kept and the prediction agrees."""
    config = load(ROOT / "configs/tiny.yaml", [override, "flash_attention=true"])
    shape = memory.find_shape(config.model)
    made = keeping.decide_keeping(
        dict.fromkeys(KEYS, "auto"),
        memory.kept_peaks(shape, config, device),
        config.nothing_to_keep(device),
    )
    for decision in made.values():
        assert not decision.kept and decision.available_bytes is None
        assert str(decision) == f"auto: not kept ({decision.nothing_to_keep})"
        assert why in str(decision)
    assert placing.decide_kept(shape, config, 2**50, device) == memory.Kept()


def test_eager_attention_keeps_nothing_while_experts_keep_theirs(card):
    overrides = ["training.gradient_checkpointing=true", "flash_attention=false"]
    config = load(ROOT / "configs/tiny.yaml", overrides)
    shape = memory.find_shape(config.model)
    peaks = memory.kept_peaks(shape, config, "cuda")
    made = keeping.decide_keeping(
        dict.fromkeys(KEYS, "auto"), peaks, config.nothing_to_keep("cuda")
    )
    assert [made[key].kept for key in KEYS] == [False, True]
    assert "flash_attention" in str(made["keep_attention"])
    assert placing.decide_kept(shape, config, card) == memory.Kept(experts=True)
