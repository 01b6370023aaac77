"""Opening checkpoints with experts in host memory: tensors, what is read how, faults, baking."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sparselong.checkpoint.checkpoint
from sparselong.adapters import ExtraAdapters, Masters, add_masked_lora, tuned_layers
from sparselong.adapters.bake import bake_checkpoint, put_baked_experts
from sparselong.checkpoint import Checkpoint
from sparselong.errors import StageError
from sparselong.model import load_model
from sparselong.model.host_experts import find_host_experts
from sparselong.model.packed_experts import PACKED, PackedExperts
from sparselong.runtime import using
from tests.model.conftest import KINDS
from tests.model.exchanges import exchanges

IDS = torch.randint(9, 2000, (1, 40), generator=torch.Generator().manual_seed(3))
HOST: dict[str, Any] = {"expert_placement": "host"}


def experts_of(model: Any) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [None, (1, 2), (3, 4)])
def test_tensors_are_those_of_a_model_on_the_device(checkpoints, kind, part):
    settings = {} if part is None else exchanges(*part)
    with using(**settings):
        expected = load_model(checkpoints[kind])
        with using(**HOST):
            model = load_model(checkpoints[kind])
    wanted, found = expected.state_dict(), model.state_dict()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    host = find_host_experts(model)
    assert host is not None and host.copied_bytes == 0
    (size,) = {sum(getattr(e, name).nbytes for name in PACKED) for e in experts_of(expected)}
    assert [layer.untyped_storage().nbytes() for layer in host.layers] == [size] * 4
    for number, experts in enumerate(experts_of(model)):
        places = [getattr(experts, name).untyped_storage().data_ptr() for name in PACKED]
        assert set(places) == {host.layers[number].data_ptr()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_in_host_memory_gives_the_same_logits(checkpoints, kind):
    """Also after it was opened in a model of which another process holds the rest."""
    whole = load_model(checkpoints[kind])
    for settings in ({}, exchanges(1, 2, whole)):
        with using(**{name: settings[name] for name in settings if name == "experts"}):
            expected = load_model(checkpoints[kind])(IDS).logits
            with using(**HOST):
                model = load_model(checkpoints[kind])
            assert torch.equal(model(IDS).logits, expected)


def test_experts_are_read_without_a_map_and_no_byte_twice(untrained_base, monkeypatch):
    mapped, read = [], []
    original, preadv = sparselong.checkpoint.checkpoint.safe_open, os.preadv

    def watch_maps(path: Path, *args: Any, **kwargs: Any) -> Any:
        mapped.append(path)
        return original(path, *args, **kwargs)

    def watch(file: int, parts: list, place: int) -> int:
        read.append(preadv(file, parts, place))
        return read[-1]

    monkeypatch.setattr(sparselong.checkpoint.checkpoint, "_SLICE_BYTES", 1000)
    monkeypatch.setattr(os, "preadv", watch)
    with using(**HOST, **exchanges(1, 2)):
        model = load_model(untrained_base)
    held = sum(getattr(e, name).nbytes for e in experts_of(model) for name in PACKED)
    assert sum(read) == held and max(read) <= 1000


def test_a_shard_that_changes_once_it_is_read_changes_nothing(untrained_base, tmp_path):
    base = shutil.copytree(untrained_base, tmp_path / "base")
    with using(**HOST):
        model = load_model(base)
    expected = load_model(base)(IDS).logits
    for path in base.glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("fault", ["cut", "touched"])
def test_a_shard_that_changes_while_it_is_read_is_refused(
    untrained_base, tmp_path, monkeypatch, fault
):
    base = shutil.copytree(untrained_base, tmp_path / "base")
    name = "model.layers.1.mlp.experts.gate_up_proj_blocks"
    shard = base / Checkpoint(base).tensors[name].file
    preadv, read = os.preadv, []

    def change(file: int, parts: list, place: int) -> int:
        if os.fstat(file).st_ino == shard.stat().st_ino and not read:
            read.append(place)
            os.truncate(shard, place + 100) if fault == "cut" else os.utime(shard, (1, 1))
        return preadv(file, parts, place)

    monkeypatch.setattr(os, "preadv", change)
    match = "truncated" if fault == "cut" else "changed while it was read"
    with using(**HOST), pytest.raises(StageError, match=match) as caught:
        load_model(base)
    assert shard.name in caught.value.what


def test_a_nan_scale_is_refused(untrained_base, tmp_path):
    base = shutil.copytree(untrained_base, tmp_path / "base")
    record = Checkpoint(base).tensors["model.layers.2.mlp.experts.down_proj_scales"]
    with (base / record.file).open("r+b") as file:
        file.seek(record.end - 3)
        file.write(b"\xff")
    with using(**HOST), pytest.raises(StageError, match="down_proj_scales of .* is damaged"):
        load_model(base)


def test_baked_experts_are_the_same_and_then_in_host_memory(checkpoints, tmp_path):
    """What is put in place of a layer that is on the device is copied again."""
    compressed = checkpoints["stage 02"]
    outcomes = []
    for where in ("gpu", "host"):
        with using(expert_placement=where):
            model = load_model(compressed)
        tuned, _ = add_masked_lora(
            model, targets=("q_proj",), r=2, alpha=4.0, seed=1,
            master_of=Masters(compressed.parent / "masters").read,
            extra=ExtraAdapters(("gate_up_proj", "down_proj"), 2),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            before = tuned(IDS).logits
            layers = tuned_layers(tuned)
            baked, rounding = bake_checkpoint(compressed, layers, tmp_path / where)
            put_baked_experts(baked, layers)
            outcomes.append((before, tuned(IDS).logits, rounding))
    (first, second, rounding), (*found, again) = outcomes
    assert torch.equal(found[0], first) and torch.equal(found[1], second)
    assert not torch.equal(first, second) and again == rounding
    for path in (tmp_path / "gpu").glob("tuned-*.safetensors"):
        assert (tmp_path / "host" / path.name).read_bytes() == path.read_bytes()
