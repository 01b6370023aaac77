"""Layers in slices of rows on a GPU: gradients, memory that does not grow with the length, copies
beside the computation."""

from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.shape_20b import adapt, build_packed, config_of
from sparselong.memory import Kept
from sparselong.model.row_slices import slice_rows
from sparselong.runtime import DeviceInputs, HostInputs, checkpoint_contexts, using

LAYERS, TOKENS = 4, 1024
IDS = torch.randint(0, 2048, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def build_model(arm: str) -> nn.Module:
    """Return a small model of an arm, with adapters that give every parameter a gradient."""
    torch.manual_seed(0)
    model = adapt(build_packed(config_of(LAYERS, 8, 2048), arm), arm, Kept())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.count_nonzero() == 0:
            nn.init.normal_(parameter, std=0.01)  # so that no gradient is zero
        assert "lora" in name or not parameter.requires_grad
    return model


@pytest.fixture(scope="module", params=["masked", "experts"])
def model(request) -> nn.Module:
    return build_model(request.param)


def differentiate(model, ids=IDS, autocast=False) -> dict[str, torch.Tensor]:
    """Return the loss and every gradient, with attention that gives the same bits every time."""
    model.zero_grad()
    ids = ids.cuda()
    with using(attention_backend="triton", deterministic=True):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in trained}}


def plainly(model, *args, **more) -> dict[str, torch.Tensor]:
    contexts = partial(checkpoint_contexts, False)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    return differentiate(model, *args, **more)


def in_slices(model, inputs, rows, *args, keeps=False, **more) -> dict[str, torch.Tensor]:
    slice_rows(model.get_base_model(), rows, inputs, keeps)
    return differentiate(model, *args, **more)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("inputs", [DeviceInputs, HostInputs])
@pytest.mark.parametrize("autocast", [False, True])
def test_one_slice_gives_the_bits_of_whole_layers(model, inputs, keeps, autocast):
    """Also in autocast, as stage 03 trains."""
    expected = plainly(model, autocast=autocast)
    got = in_slices(model, inputs(), TOKENS, keeps=keeps, autocast=autocast)
    different = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert different == []


def test_host_inputs_give_the_bits_of_device_inputs(model):
    """Over several steps, in which the host runs ahead of copies and kernels."""
    host, device = HostInputs(), DeviceInputs()
    for ids in (IDS, IDS.flip(1), IDS[:, :700]):
        got, expected = (in_slices(model, each, 300, ids) for each in (host, device))
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_slices_err_no_more_than_bf16_rounding_explains(model):
    expected, got = plainly(model), in_slices(model, HostInputs(), 300)
    assert abs(got["loss"] - expected["loss"]) < 2e-3 * expected["loss"]
    for name, want in expected.items():
        # Rounding differs by slice, and may route a token to another expert.
        assert (got[name] - want).float().norm() < 0.2 * want.float().norm(), name


def test_one_slice_of_several_of_the_experts_slices_gives_the_same_bits(model):
    """More tokens than the experts process at once: they divide a slice as they do a layer."""
    ids = IDS.repeat(1, 18)
    expected, got = plainly(model, ids), in_slices(model, HostInputs(), 18 * TOKENS, ids)
    different = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert different == []


def test_kept_attention_is_freed_layer_by_layer(model):
    """Where a layer's backward pass begins, those of the layers after it are gone."""
    peaks = {}
    for keeps in (False, True):
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            in_slices(model, DeviceInputs(), TOKENS, IDS.repeat(1, 8), keeps=keeps)
            peaks[keeps] = torch.cuda.max_memory_allocated() - before
    kept = 8 * TOKENS * (2 * 4096 + 4 * 64)
    # The last layer is full: what it keeps is in use. The other full layer's comes on top.
    assert peaks[True] - peaks[False] < 1.5 * kept


def test_a_longer_sequence_needs_little_more_memory(model):
    """Of three quarters more tokens: what attention and the loss need, and two buffers."""
    peaks = {}
    for tokens in (4096, 16_384):
        ids = IDS.repeat(1, tokens // TOKENS)
        in_slices(model, HostInputs(), 1024, ids)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        in_slices(model, HostInputs(), 1024, ids)
        peaks[tokens] = torch.cuda.max_memory_allocated() - before
    hidden = 2 * 2880
    attention = 2 * (4 * 4096 + 6 * 512) + 64 * 4
    assert peaks[16_384] - peaks[4096] < 12_288 * (attention + 5 * hidden)
