"""Layers in slices of rows: the loss and gradients of torch's checkpoints, with inputs kept on the
device or in host memory."""

import gc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sparselong.model import FusedDecoderLayer, find_host_experts, load_model, row_slices
from sparselong.model.row_slices import slice_rows
from sparselong.runtime import DeviceInputs, HostInputs, checkpoint_contexts, using
from sparselong.tiny.build import TinySpec, build_tiny
from tests.distributed.expert_training import draw_adapters, open_model

TOKENS, ROWS = 50, 16
IDS = torch.randint(0, 600, (2, TOKENS), generator=torch.Generator().manual_seed(0))
LAYERS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    spec = TinySpec(layers=LAYERS, vocab_size=600, steps=0)
    return build_tiny(tmp_path_factory.mktemp("base") / "base", spec, seed=1)


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    """A model with adapters everywhere, and trained sinks and norms."""
    path = tmp_path_factory.mktemp("adapters") / "adapters.pt"
    draw_adapters(base, path)
    model = open_model(base)
    model.load_state_dict(torch.load(path), strict=False)
    for name, parameter in model.named_parameters():
        if "sinks" in name or "layernorm" in name:
            parameter.requires_grad_()
    return model


def differentiate(model: nn.Module, ids: torch.Tensor = IDS, **more) -> dict[str, torch.Tensor]:
    """Return the loss and every gradient of one pass."""
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False, **more).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **grads}


def plainly(model: nn.Module, *args, **more) -> dict[str, torch.Tensor]:
    contexts = partial(checkpoint_contexts, False)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    return differentiate(model, *args, **more)


def in_slices(model: nn.Module, inputs, *args, rows: int = ROWS, **more):
    slice_rows(model.get_base_model(), rows, inputs)
    return differentiate(model, *args, **more)


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance=1e-5):
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        assert (got[name] - want).norm() <= tolerance * want.norm(), name
        assert want.norm() > 0, name


@pytest.mark.parametrize("rows", [1, 16, 49, TOKENS, 999])
@pytest.mark.parametrize("inputs", [DeviceInputs, HostInputs])
def test_loss_and_gradients_are_those_of_whole_layers(model, inputs, rows):
    ids = IDS[:, :12] if rows == 1 else IDS
    expected = plainly(model, ids)
    assert_same(in_slices(model, inputs(), ids, rows=rows), expected)


def test_packed_documents_and_padding(model):
    positions = torch.cat([torch.arange(n) for n in (20, 7, 23)])[None].expand(2, -1)
    mask = torch.ones_like(IDS)
    mask[1, 40:] = 0
    for more in ({"position_ids": positions}, {"attention_mask": mask}):
        assert_same(in_slices(model, HostInputs(), **more), plainly(model, **more))


def test_rows_are_those_of_all_sequences_together(model, monkeypatch):
    seen = []
    finish = row_slices._Job.finish
    monkeypatch.setattr(
        row_slices._Job,
        "finish",
        lambda job, attended, *more: (
            seen.append(attended.shape[:2]) or finish(job, attended, *more)
        ),
    )
    in_slices(model, DeviceInputs(), rows=20)
    assert set(seen) == {(2, 10)}


def test_eager_attention(base):
    """Whose model is opened unfused; masks are whole, whatever the slices."""
    results = []
    for compute in (plainly, partial(in_slices, inputs=HostInputs())):
        torch.manual_seed(0)
        eager: Any = load_model(base, device=torch.device("cpu"), attn_implementation="eager")
        assert not any(isinstance(module, FusedDecoderLayer) for module in eager.modules())
        tuned: Any = get_peft_model(eager, LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
        tuned.enable_input_require_grads()
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        results.append(compute(tuned.train()))
    assert_same(results[1], results[0])


def test_autocast_applies_to_the_recomputation(model):
    """One slice in bfloat16 gives the same bits as torch's checkpoints."""
    with torch.autocast("cpu", torch.bfloat16):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = [model(IDS, labels=IDS, use_cache=False).loss]
        expected = gradients_of(model, losses[0])
        slice_rows(model.get_base_model(), 2 * TOKENS, HostInputs())
        losses.append(model(IDS, labels=IDS, use_cache=False).loss)
        got = gradients_of(model, losses[1])
    assert losses[0] == losses[1]
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def gradients_of(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradients of a loss, outside autocast, as a trainer's backward pass."""
    model.zero_grad()
    with torch.autocast("cpu", enabled=False):
        loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_slices_copy_a_layer_of_experts_once_a_pass(base, tmp_path):
    """As without slices: its neighbours are copied ahead of use, in the pass's direction."""
    draw_adapters(base, tmp_path / "adapters.pt")
    copied = {}
    for name in ("whole", "slices"):
        with using(expert_placement="host"):
            model = open_model(base)
        model.load_state_dict(torch.load(tmp_path / "adapters.pt"), strict=False)
        run = plainly if name == "whole" else partial(in_slices, inputs=HostInputs())
        made = [run(model) for _ in range(2)]
        host = find_host_experts(model)
        assert host is not None
        copied[name] = host.copied_bytes / host.layer_bytes, made
    assert copied["slices"][0] == copied["whole"][0] == (2 * LAYERS - 2) + (2 * LAYERS - 4)
    for got, expected in zip(copied["slices"][1], copied["whole"][1], strict=True):
        assert_same(got, expected)


def test_passes_of_other_lengths_and_interrupted_ones_follow(model):
    inputs = HostInputs()
    for ids in (IDS, IDS[:1, :21], IDS):
        assert_same(in_slices(model, inputs, ids), plainly(model, ids))
    slice_rows(model.get_base_model(), ROWS, inputs)
    model(IDS, labels=IDS, use_cache=False)  # its backward pass never runs
    again = in_slices(model, inputs)
    assert_same(again, plainly(model))


def test_each_input_is_copied_once_to_the_host_and_once_back(model):
    inputs = HostInputs()
    in_slices(model, inputs)
    size = 4 * IDS.numel() * model.config.hidden_size
    # The last layer's input is still on the device.
    assert inputs.copied_bytes == size * (LAYERS + LAYERS - 1)


def test_host_memory_is_reused_and_released(model, monkeypatch):
    made = []
    from sparselong.runtime import layer_inputs

    allocate = layer_inputs.allocate_locked
    monkeypatch.setattr(
        layer_inputs, "allocate_locked", lambda size: made.append(size) or allocate(size)
    )
    inputs = HostInputs()
    ids = IDS[:, :20]
    for _ in range(3):
        in_slices(model, inputs, ids)
    assert made == [4 * ids.numel() * model.config.hidden_size] * LAYERS
    for _ in range(3):  # forward passes without backward passes keep nothing
        model(ids, labels=ids, use_cache=False)
        gc.collect()
    assert len(made) <= 4 * LAYERS


def test_two_losses_at_once_are_refused_rather_than_wrong(model):
    slice_rows(model.get_base_model(), ROWS, HostInputs())
    first = model(IDS, labels=IDS, use_cache=False).loss
    second = model(IDS.flip(1), labels=IDS, use_cache=False).loss
    with pytest.raises(RuntimeError, match="modified inplace|modified by an inplace"):
        (first + second).backward()
