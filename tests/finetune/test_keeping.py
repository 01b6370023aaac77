"""What layers keep depends on the GPU's available memory and is equal on all ranks."""

import pytest
import torch

from sparselong import memory
from sparselong.config.schema import Config, load
from sparselong.finetune import keeping
from sparselong.memory import placing
from tests.conftest import ROOT

GIB = 2**30
KEYS = ("keep_attention", "keep_experts")
WHOLE = ("training.slice_rows=never", "training.offload_checkpoints=false")


def load_20b(*overrides: str) -> Config:
    return load(ROOT / "configs/gpt-oss-20b-1x3090.yaml", [*WHOLE, *overrides])


def decide(*overrides: str) -> dict[str, keeping.Keeping]:
    return keeping.decide_keeping(load_20b(*overrides), "cuda", memory.Held())


def peak(*kept: int) -> int:
    config = load_20b()
    shape = memory.find_shape(config.model)
    return memory.finetune_memory(shape, config, kept=memory.Kept(*kept)).peak_bytes


@pytest.fixture
def set_card(monkeypatch):
    """A GPU of 40 GiB of which this process has reserved 13 GiB; available is what is given."""

    def set_available(size: int) -> None:
        free = size - memory.CONTEXT_BYTES - 13 * GIB
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 40 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 13 * GIB)

    set_available(24 * GIB)
    return set_available


@pytest.mark.parametrize(
    ("layers", "text"), [(1, "the last of 24"), (3, "the last 3 of 24"), (24, "all 24")]
)
def test_auto_keeps_the_experts_of_as_many_layers_as_fit_with_the_margin(set_card, layers, text):
    with_attention, needed = "training.keep_attention=always", peak(True, layers) * placing.MARGIN
    set_card(int(needed) + 1)
    attention, experts = (decide(with_attention)[key] for key in KEYS)
    assert (attention.kept, attention.layers) == (12, 12)
    assert (experts.kept, experts.layers) == (layers, 24)
    assert experts.available_bytes == int(needed) + 1
    assert experts.predicted_peak_bytes == peak(True, layers)
    assert f"auto: kept in {text} layers; predicted peak" in str(experts)
    assert "always: kept in all 12 layers; predicted peak" in str(attention)
    set_card(int(needed) - 1)
    assert decide(with_attention)["keep_experts"].kept == layers - 1


def test_attention_is_kept_before_experts(set_card):
    needed = peak(True, 0) * placing.MARGIN
    set_card(int(needed) - 1)
    attention, experts = (decide()[key] for key in KEYS)
    assert attention.kept == 0 and experts.kept > 0
    assert attention.predicted_peak_bytes == peak(True, 0)
    assert experts.predicted_peak_bytes == peak(False, experts.kept)
    assert "auto: recomputed; predicted peak if kept" in str(attention)


@pytest.mark.parametrize(("asked", "counts"), [("always", (12, 24)), ("never", (0, 0))])
@pytest.mark.parametrize("size", [GIB, 100 * GIB])
def test_always_and_never_are_followed(set_card, asked, counts, size):
    set_card(size)
    made = decide(*(f"training.{key}={asked}" for key in KEYS))
    assert [made[key].kept for key in KEYS] == list(counts)
    assert {made[key].asked for key in KEYS} == {asked}


def test_the_rank_with_the_least_memory_decides_and_is_asked_once(set_card, monkeypatch):
    asked = []
    least = int(peak(True, 2) * placing.MARGIN) + 1
    monkeypatch.setattr(
        keeping.ranks, "collect", lambda own: asked.append(own) or [own, least, own]
    )
    made = decide()
    assert made["keep_experts"].kept == 2 and made["keep_experts"].available_bytes == least
    assert asked == [24 * GIB]


@pytest.mark.parametrize(
    ("device", "override", "why"),
    [
        ("cpu", "training.gradient_checkpointing=true", "no GPU"),
        ("cuda", "training.gradient_checkpointing=false", "gradient_checkpointing is false"),
    ],
)
def test_if_nothing_can_be_kept_the_decision_says_why(set_card, device, override, why):
    """Although memory is available, nothing is kept and the prediction agrees."""
    config = load(ROOT / "configs/tiny.yaml", [override, "flash_attention=true"])
    shape = memory.find_shape(config.model)
    made = keeping.decide_keeping(config, device, memory.Held())
    for decision in made.values():
        assert not decision.kept and decision.available_bytes is None
        assert str(decision) == f"auto: not kept ({decision.nothing_to_keep})"
        assert why in str(decision)
    assert placing.decide_kept(shape, config, 2**50, device) == memory.Kept()


def test_eager_attention_keeps_nothing_while_experts_keep_theirs(set_card):
    overrides = ["training.gradient_checkpointing=true", "flash_attention=false"]
    config = load(ROOT / "configs/tiny.yaml", overrides)
    made = keeping.decide_keeping(config, "cuda", memory.Held())
    layers = memory.find_shape(config.model).layers
    assert [made[key].kept for key in KEYS] == [0, layers]
    assert "flash_attention" in str(made["keep_attention"])


def test_shared_experts_keep_nothing_while_attention_keeps_its_outputs(set_card):
    made = keeping.decide_keeping(load_20b(), "cuda", memory.Held(2))
    assert [made[key].kept for key in KEYS] == [12, 0]
    assert "2 processes share the experts" in str(made["keep_experts"])
