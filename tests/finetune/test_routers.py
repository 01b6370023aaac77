"""Non-finite router logits stop training, by layer and step, before the optimizer."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig, GptOssForCausalLM

from sparselong.errors import StageError
from sparselong.finetune.routers import RouterWatch


@pytest.fixture
def model() -> GptOssForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "head_dim": 8}
    config = GptOssConfig(
        **sizes, num_hidden_layers=3, num_local_experts=4, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    return GptOssForCausalLM(config)


def at(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step)


def test_finite_router_logits_pass(model):
    watch = RouterWatch(model)
    model(torch.arange(8)[None])
    assert len(watch.names) == 3 and watch.flags is not None and not watch.flags.any()
    watch.on_pre_optimizer_step(None, at(4), None)
    watch.on_evaluate(None, at(4), None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_non_finite_layer_and_the_step_are_named(model, value):
    watch = RouterWatch(model)
    with torch.no_grad():
        model.model.layers[1].mlp.router.weight[2, 3] = value
    model(torch.arange(8)[None])
    model.model.layers[1].mlp.router.weight.data.zero_()
    model(torch.arange(8)[None])  # a later finite micro-batch does not clear it
    with pytest.raises(StageError, match=r"model\.layers\.1\.mlp\.router .* in step 5") as caught:
        watch.on_pre_optimizer_step(None, at(4), None)
    assert "of 3 layers" in caught.value.found
    with pytest.raises(StageError, match="evaluation after step 4"):
        watch.on_evaluate(None, at(4), None)


def test_it_works_in_checkpointed_layers(model):
    watch = RouterWatch(model)
    mlp = model.model.layers[2].mlp
    x = torch.full((1, 4, 32), float("nan"), requires_grad=True)
    checkpoint(lambda x: mlp(x)[0], x, use_reentrant=False).sum().backward()
    with pytest.raises(StageError, match=r"layers\.2\.mlp"):
        watch.on_pre_optimizer_step(None, at(0), None)
