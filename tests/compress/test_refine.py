"""Refinement: attention's output is closer to the base's, in the same form of storage."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sparselong.checkpoint import Checkpoint, layer_tensors, open_upstream
from sparselong.compress import refine as refine_module
from sparselong.compress.background import Seconds
from sparselong.compress.calibration import HiddenStates
from sparselong.compress.layer import CalibratedLayer
from sparselong.compress.work import Spread
from sparselong.config import CalibrationSection
from sparselong.packing import DenseFormat, dense, integer

INT4, BF16 = DenseFormat(4, "2:4", 64), DenseFormat(16, "2:4", 64)
SEQUENCES, LENGTH, STEPS = 8, 64, 20
STEM = "model.layers.0.self_attn"


@dataclass
class Made:
    """A compressed first layer, and the error of its attention's output over all sequences."""

    layer: CalibratedLayer
    result: Any
    error: float


@pytest.fixture(scope="module")
def base(untrained_base) -> Checkpoint:
    return Checkpoint(untrained_base)


def make(base: Checkpoint, folder, fmt: DenseFormat = INT4, steps: int = STEPS) -> Made:
    device, architecture = torch.device("cpu"), open_upstream(base)
    shape = (SEQUENCES, LENGTH, architecture.hidden_size)
    states = HiddenStates(folder / "states", shape, torch.float32, device, 128, Spread())
    states.start(
        base, torch.randint(0, 2000, shape[:2], generator=torch.Generator().manual_seed(0))
    )
    tensors = base.read(layer_tensors(architecture, 0))
    layer = CalibratedLayer(architecture, 0, tensors, device, torch.float32, "eager")
    before = {name: getattr(layer.layer.self_attn, name) for name in dense_names()}
    given = CalibrationSection(refinement_steps=steps)
    result = layer.compress(states, fmt, given, Spread(), Seconds())
    now = {name: getattr(layer.layer.self_attn, name) for name in before}
    with torch.no_grad():
        expected, found = (layer._attend(states.states, each) for each in (before, now))
    error = float((found - expected).square().sum() / expected.square().sum())
    return Made(layer, result, error)


def dense_names() -> tuple[str, ...]:
    return ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize("fmt", [INT4, BF16])
def test_attention_is_closer_and_masks_and_scales_are_the_solvers(base, tmp_path, fmt):
    solved, refined = make(base, tmp_path, fmt, steps=0), make(base, tmp_path, fmt)
    assert refined.error < 0.95 * solved.error
    assert solved.result.attention_error == {}
    said = refined.result.attention_error
    assert said["refined"] < said["solved"]
    assert set(solved.result.stored) == set(refined.result.stored)
    for name, tensor in solved.result.stored.items():
        if not name.endswith("weight_packed"):
            assert torch.equal(tensor, refined.result.stored[name]), name


def test_masters_round_to_the_stored_codes_and_dropped_ones_stay(base, tmp_path):
    solved, refined = make(base, tmp_path, steps=0).result, make(base, tmp_path).result
    for name in dense_names():
        stored = {
            key.removeprefix(f"{STEM}.{name}."): tensor
            for key, tensor in refined.stored.items()
            if key.startswith(f"{STEM}.{name}.")
        }
        mask = dense.unpack_mask(INT4, stored)
        master = refined.masters[f"{STEM}.{name}.weight"]
        codes = integer.quantize(torch.where(mask, master, 0.0), stored["weight_scale"], 4)
        assert torch.equal(codes, dense.unpack_values(INT4, stored))
        before = solved.masters[f"{STEM}.{name}.weight"]
        assert torch.equal(master[~mask], before[~mask])
        assert not torch.equal(master[mask], before[mask])


def test_the_layer_uses_what_is_stored_and_again_gives_the_same_bytes(base, tmp_path):
    one, other = make(base, tmp_path), make(base, tmp_path)
    for name in dense_names():
        packed = getattr(one.layer.layer.self_attn, name).weight_packed
        assert torch.equal(packed, one.result.stored[f"{STEM}.{name}.weight_packed"])
    for name, tensor in (one.result.stored | one.result.masters).items():
        assert torch.equal(tensor, (other.result.stored | other.result.masters)[name]), name


def test_what_does_not_help_is_not_taken(base, tmp_path, monkeypatch):
    solved = make(base, tmp_path, steps=0).result
    monkeypatch.setattr(refine_module, "RATE", 1e4)
    kept = make(base, tmp_path, steps=2).result
    assert kept.attention_error["refined"] == kept.attention_error["solved"] > 0
    for name, tensor in (solved.stored | solved.masters).items():
        assert torch.equal(tensor, (kept.stored | kept.masters)[name]), name


def test_attention_that_puts_out_nothing_is_left_as_it_is(base, tmp_path, monkeypatch):
    """Its relative error has no denominator."""
    solved = make(base, tmp_path, steps=0).result
    attend = CalibratedLayer._attend
    monkeypatch.setattr(CalibratedLayer, "_attend", lambda *given: 0.0 * attend(*given))
    kept = make(base, tmp_path, steps=2).result
    assert kept.attention_error == {"solved": 0.0, "refined": 0.0}
    for name, tensor in (solved.stored | solved.masters).items():
        assert torch.equal(tensor, (kept.stored | kept.masters)[name]), name


@pytest.mark.parametrize("power", [70, -70])
def test_the_size_of_attentions_output_does_not_matter(base, tmp_path, monkeypatch, power):
    """The squares of such outputs are beyond fp32; a power of two changes no other bit."""
    plain = make(base, tmp_path).result
    attend = CalibratedLayer._attend
    monkeypatch.setattr(CalibratedLayer, "_attend", lambda *given: 2.0**power * attend(*given))
    scaled = make(base, tmp_path).result
    assert scaled.attention_error == plain.attention_error
    for name, tensor in (plain.stored | plain.masters).items():
        assert torch.equal(tensor, (scaled.stored | scaled.masters)[name]), name
