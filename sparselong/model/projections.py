"""Read a compressed checkpoint's attention projections, and measure their 2:4 sparsity."""

from __future__ import annotations

import torch

from sparselong.checkpoint import PROJECTIONS, Checkpoint
from sparselong.model.quantizer import SparseLongConfig
from sparselong.packing import dense, two_four


def stored_projections(model: Checkpoint, layer: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return one layer's packed tensors by the full name of their projection."""
    found = {}
    for projection in PROJECTIONS:
        full = f"model.layers.{layer}.self_attn.{projection}"
        names = [name for name in model.tensors if name.startswith(f"{full}.weight_")]
        found[full] = {n.removeprefix(f"{full}."): t for n, t in model.read(names).items()}
    return found


def two_four_conforming(model: Checkpoint) -> float:
    """Return the share of groups of four attention weights with at most two nonzero weights.

    It is counted on the decoded weights, whatever the format claims.
    """
    fmt = SparseLongConfig(**model.config["quantization_config"]).dense_format
    conforming = total = 0
    for layer in range(model.config["num_hidden_layers"]):
        if not (fmt.is_sparse or fmt.is_quantized):
            prefix = f"model.layers.{layer}.self_attn"
            weights = list(model.read(f"{prefix}.{p}.weight" for p in PROJECTIONS).values())
        else:
            stored = stored_projections(model, layer)
            weights = [dense.unpack(fmt, tensors) for tensors in stored.values()]
        for weight in weights:
            groups = two_four.is_two_four(weight != 0)
            conforming += int(groups.sum())
            total += groups.numel()
    return conforming / total
