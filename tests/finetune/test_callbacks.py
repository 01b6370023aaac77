"""Actions per step on the model: mask updates and recomputation."""

from types import SimpleNamespace

import pytest

from sparselong.finetune import callbacks
from sparselong.finetune.callbacks import MaskUpkeep, Recomputation
from sparselong.finetune.state import Progress
from sparselong.model import row_slices
from sparselong.runtime import DeviceInputs, HostInputs


def at(step: int, **more) -> SimpleNamespace:
    values = {"max_steps": 20, "epoch": 0.5, "best_metric": None, "best_model_checkpoint": None}
    return SimpleNamespace(global_step=step, **{**values, **more})


def control() -> SimpleNamespace:
    return SimpleNamespace(should_log=False, should_save=False)


class FakeLayer:
    """A layer whose updates flip the given fractions of its bits in turn."""

    patterns = scale = None

    def __init__(self, weights: int, *shares: float):
        self.master = SimpleNamespace(numel=lambda: weights)
        self.shares = list(shares)

    def update(self, criterion: str) -> float:
        assert criterion == "hysteresis"
        return self.shares.pop(0)


def test_masks_are_updated_on_schedule_and_frozen_at_the_end(capsys):
    layers = {"layers.0.self_attn.q_proj": FakeLayer(64, 0.5, 0.25, 0.0)}
    progress = Progress()
    upkeep = MaskUpkeep(layers, progress, 0.25, "hysteresis")
    upkeep.on_train_begin(None, at(0), control())
    for step in range(1, 21):
        upkeep.on_step_end(None, at(step), control())
    updates = [(update["step"], update["flipped"]) for update in progress.mask_updates]
    assert updates == [(5, 0.5), (10, 0.25), (15, 0.0)]
    assert [upkeep.next_step(step) for step in (0, 4, 5, 14, 15)] == [5, 5, 10, 15, None]
    assert all(layer.shares == [] for layer in layers.values())


def test_flipped_fractions_weight_layers_by_size(capsys):
    """32 + 24 of 256 query bits and 8 of 32 key bits flip: no plain mean over layers."""
    layers = {
        "layers.0.self_attn.q_proj": FakeLayer(64, 0.5),
        "layers.0.self_attn.k_proj": FakeLayer(32, 0.25),
        "layers.1.self_attn.q_proj": FakeLayer(192, 0.125),
    }
    progress = Progress()
    upkeep = MaskUpkeep(layers, progress, 0.25, "hysteresis")
    upkeep.on_train_begin(None, at(0), control())
    upkeep.on_step_end(None, at(5), control())
    (update,) = progress.mask_updates
    assert update["flipped"] == (32 + 24 + 8) / 288
    assert update["flipped_by_kind"] == {"q_proj": (32 + 24) / 256, "k_proj": 8 / 32}
    assert "flipped 22.222% of the bits (q_proj 21.875%, k_proj 25.000%)" in capsys.readouterr().out


@pytest.mark.parametrize("offloads", [False, True])
def test_layers_in_slices_replace_checkpoints(monkeypatch, offloads):
    seen = {}
    monkeypatch.setattr(row_slices, "fuse", lambda model: None)

    class Base:
        def _set_gradient_checkpointing(self, enable, gradient_checkpointing_func):
            seen.update(gradient_checkpointing_func.keywords, enable=enable)

    made = Recomputation(True, 0, rows=64, offloads=offloads)
    model = SimpleNamespace(get_base_model=Base)
    made.on_train_begin(SimpleNamespace(gradient_checkpointing=True), at(0), control(), model=model)
    assert type(seen.pop("inputs")) is (HostInputs if offloads else DeviceInputs)
    assert seen == {"enable": True, "rows": 64, "keep_attention": True}


@pytest.mark.parametrize("on", [True, False])
def test_checkpointed_layers_keep_what_was_decided(monkeypatch, on):
    given = []
    monkeypatch.setattr(callbacks, "checkpoint_layers", lambda *what: given.append(what))
    model = SimpleNamespace(get_base_model=lambda: "base")
    args = SimpleNamespace(gradient_checkpointing=on)
    Recomputation(True, 3).on_train_begin(args, at(0), control(), model=model)
    assert given == ([("base", True, 3)] if on else [])
