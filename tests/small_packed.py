"""A gpt-oss of two layers with packed experts and random weights, for tests of compiled models."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GptOssConfig, GptOssForCausalLM

from sparselong.model.fused import chunk_loss, fuse
from sparselong.model.quantizer import replace_with_packed
from sparselong.packing import two_four
from sparselong.packing.dense import DenseFormat

CONFIG: dict[str, Any] = {
    **{"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "head_dim": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16},
    **{"num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 256},
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def build_packed(device: str, dtype: torch.dtype, fmt: DenseFormat | None = None) -> Any:
    """Return the model, frozen but for its sinks, with our attention, layers and loss."""
    torch.manual_seed(0)
    model: Any = GptOssForCausalLM._from_config(
        GptOssConfig(**CONFIG), dtype=dtype, attn_implementation="sparselong"
    )
    replace_with_packed(model, fmt or DenseFormat(16, "none", 64))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("weight_mask"):
            tensor.copy_(two_four.pack_mask(_draw_mask(len(tensor), tensor.shape[1] // 3 * 32)))
        elif name.endswith(("_blocks", "weight_packed")):
            tensor.random_(0, 256)
        elif name.endswith("_scales"):
            tensor.random_(119, 123)
        elif "norm" not in name and "rotary" not in name and tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.1)
    model.to(device=device, dtype=dtype).requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.sinks.requires_grad_()
    fuse(model)
    chunk_loss(model)
    return model.train()


def _draw_mask(rows: int, columns: int) -> torch.Tensor:
    kept = torch.rand(rows, columns // 4, 4).argsort(-1) < 2
    return kept.view(rows, columns)


def add_lora(model: Any) -> Any:
    """Return the model with PEFT's LoRA on attention."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(PROJECTIONS))
    return _draw_factors(get_peft_model(model, config))


def add_masked(model: Any, router: bool) -> Any:
    """Return the model with masked LoRA on attention, and LoRA on experts and perhaps routers."""
    from sparselong.adapters import ExtraAdapters, add_masked_lora

    tuned, _ = add_masked_lora(
        model,
        targets=PROJECTIONS,
        r=2,
        alpha=4.0,
        master_of=lambda name: model.get_submodule(name).dequantize(),
        seed=1,
        extra=ExtraAdapters(("gate_up_proj", "down_proj"), 2, router),
    )
    return _draw_factors(tuned).train()


def _draw_factors(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def draw_batch(tokens: int, device: str, packed: bool = True) -> dict[str, torch.Tensor]:
    """Return a batch of one row: two packed documents, or one; the first tokens are not learned."""
    torch.manual_seed(tokens)
    ids = torch.randint(CONFIG["vocab_size"], (1, tokens))
    labels = ids.clone()
    labels[:, :3] = -100
    ends = (tokens // 3, tokens - tokens // 3) if packed else (tokens,)
    positions = torch.cat([torch.arange(each) for each in ends])[None]
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def differentiate(model: Any, run: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the loss and the gradient of every trained parameter, `run` being called."""
    model.zero_grad(set_to_none=True)
    loss = run(**batch, use_cache=False).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    return {"loss": loss.detach(), **found}
