"""Fused modules, and the chunked loss against transformers' (on a GPU: tests/gpu)."""

import copy

import pytest
import torch
from torch import nn
from transformers import GptOssForCausalLM
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.gpt_oss import modeling_gpt_oss

from sparselong.model.fused import (
    FusedAttention,
    FusedDecoderLayer,
    FusedMLP,
    FusedRMSNorm,
    chunk_loss,
    fuse,
)
from sparselong.model.loading import load_model

IDS = torch.randint(9, 2000, (3, 50), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(untrained_base) -> GptOssForCausalLM:
    return load_model(untrained_base, device=torch.device("cpu"))


def classes(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules()}


def test_a_model_with_sparselong_attention_is_fused(untrained_base, model):
    fused = {FusedAttention, FusedDecoderLayer, FusedRMSNorm}
    assert not fused & classes(model)
    ours = load_model(untrained_base, device=torch.device("cpu"), attn_implementation="sparselong")
    assert fused <= classes(ours)
    assert not any(type(m).__name__.startswith("GptOssRMSNorm") for m in ours.modules())
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        got = ours(IDS, use_cache=False).logits
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_fusing_changes_only_the_given_model(model):
    ours = copy.deepcopy(model)
    fuse(ours)
    fuse(ours)
    assert FusedRMSNorm in classes(ours) and FusedRMSNorm not in classes(model)
    assert ours.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="model: Linear without gpt-oss layers"):
        fuse(nn.Linear(2, 2))


@pytest.fixture
def restored(monkeypatch):
    """Restore what Liger replaces in transformers' module."""
    for name in ("apply_rotary_pos_emb", "GptOssRMSNorm"):
        monkeypatch.setattr(modeling_gpt_oss, name, getattr(modeling_gpt_oss, name))


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("kept", [{}, {"rope": False}, {"rms_norm": False}])
def test_fusing_a_model_with_ligers_layers_is_refused(model, kept):
    ours = copy.deepcopy(model)
    apply_liger_kernel(ours, kept)  # what `use_liger_kernel` calls
    with pytest.raises(ValueError, match="model: Liger's norms or rotary embedding"):
        fuse(ours)


@pytest.mark.usefixtures("restored")
def test_a_fused_model_takes_ligers_loss_but_not_its_layers(model):
    ours = copy.deepcopy(model)
    fuse(ours)
    with pytest.raises(ValueError, match="allowed in a fused model: transformers' own"):
        apply_liger_kernel(ours, {"rope": False})
    rotary = modeling_gpt_oss.apply_rotary_pos_emb
    apply_liger_kernel(ours, {"rms_norm": False})  # which says nothing itself
    with pytest.raises(ValueError, match="allowed in a fused model: transformers' own"):
        ours(IDS)
    modeling_gpt_oss.apply_rotary_pos_emb = rotary
    apply_liger_kernel(ours, {"rope": False, "rms_norm": False})
    assert ours.forward.__module__ == "liger_kernel.transformers.model.gpt_oss"
    with torch.no_grad():  # without labels, its forward pass leaves the loss to transformers
        expected, got = model(IDS).logits, ours(IDS).logits
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("hooked", ["nothing", "layer", "experts"])
def test_the_experts_add_the_residual_unless_a_hook_asks_for_their_output(
    untrained_base, model, packed, hooked
):
    ours = (
        load_model(untrained_base, device=torch.device("cpu")) if packed else copy.deepcopy(model)
    )
    fuse(ours)
    layer: FusedMLP = ours.model.layers[0].mlp
    layer.experts.requires_grad_(False)
    normed, total, upstream = torch.randn(3, 2, 5, layer.router.hidden_dim)
    leaves = [normed.requires_grad_(), total.requires_grad_()]
    expected = total + layer(normed)[0]
    seen = []
    if hooked != "nothing":
        module = layer if hooked == "layer" else layer.experts
        module.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    got = layer.add_to(total, normed)
    assert torch.equal(got, expected) and len(seen) == (hooked != "nothing")
    if hooked == "experts":
        assert torch.equal(seen[0].view_as(total) + total, expected)
    both = (torch.autograd.grad(out, leaves, upstream) for out in (got, expected))
    assert all(map(torch.equal, *both))


@pytest.mark.parametrize("count", [None, 41, torch.tensor(41)])
@pytest.mark.parametrize("given", ["labels", "shift_labels"])
def test_the_loss_equals_that_of_transformers(model, count, given):
    ours = copy.deepcopy(model)
    chunk_loss(ours)
    labels = IDS.masked_fill(IDS % 3 == 0, -100)
    extra = {} if count is None else {"num_items_in_batch": count}
    if given == "shift_labels":
        extra["shift_labels"] = IDS.masked_fill(IDS % 5 == 0, -100)
    outcomes = []
    for each in (model, ours):
        weight = each.model.layers[0].self_attn.sinks.requires_grad_()
        output = each(IDS, labels=labels, use_cache=False, **extra)
        outcomes.append((output, *torch.autograd.grad(output.loss, weight)))
    (theirs, gradient), (chunked, our_gradient) = outcomes
    assert abs(chunked.loss - theirs.loss) <= 1e-5 * theirs.loss
    assert (our_gradient - gradient).norm() <= 1e-4 * gradient.norm()
    assert chunked.logits is None and theirs.logits is not None


def test_logits_are_returned_without_labels(model):
    ours = copy.deepcopy(model)
    chunk_loss(ours)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, model(IDS).logits)
        assert torch.equal(ours(IDS, logits_to_keep=1).logits, model(IDS, logits_to_keep=1).logits)
        output = ours(IDS, labels=IDS, output_router_logits=True)
        assert output.logits is not None and output.aux_loss is not None
        loss = ours(IDS, labels=IDS, return_dict=False)[0]
    assert abs(loss - model(IDS, labels=IDS).loss) < 1e-4


def test_under_autocast_the_products_are_in_bf16(model):
    ours = copy.deepcopy(model)
    chunk_loss(ours)
    losses = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for each in (model, ours):
            losses.append(each(IDS, labels=IDS, use_cache=False).loss)
    assert losses[1].dtype == torch.float32
    assert abs(losses[0] - losses[1]) < 1e-3 * losses[0]


def test_a_trainable_lm_head_is_refused(model):
    ours = copy.deepcopy(model)
    chunk_loss(ours)
    ours.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match="weight: requires a gradient; allowed: a frozen lm_head"):
        ours(IDS, labels=IDS)
    with pytest.raises(ValueError, match="model: GptOssModel; allowed: GptOssForCausalLM"):
        chunk_loss(ours.model)
