"""Sizes and exactness of the compressed checkpoint, measured on the written files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sparselong.checkpoint import Checkpoint, same_bytes
from sparselong.model import SparseLongConfig, stored_projections, two_four_conforming
from sparselong.packing import DenseFormat, dense, integer

_GROUPS = {
    ".self_attn.": "attention",
    ".mlp.experts.": "experts",
    "embed_tokens": "embedding",
    "lm_head": "lm_head",
}


def _group(name: str) -> str:
    return next((group for part, group in _GROUPS.items() if part in name), "router_and_norms")


def _bytes_by_group(checkpoint: Checkpoint) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, record in checkpoint.tensors.items():
        sizes[_group(name)] = sizes.get(_group(name), 0) + record.end - record.begin
    return sizes


def _weights_by_group(base: Checkpoint) -> dict[str, int]:
    """Count weights and biases by group: two per MXFP4 block byte, none per scale."""
    counts: dict[str, int] = {}
    for name, record in base.tensors.items():
        count = math.prod(record.shape)
        count = 2 * count if name.endswith("_blocks") else 0 if name.endswith("_scales") else count
        counts[_group(name)] = counts.get(_group(name), 0) + count
    return counts


def _linked_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of tensors in files shared with another directory."""
    shared = {f for f in checkpoint.files if (checkpoint.directory / f).stat().st_nlink > 1}
    return sum(r.end - r.begin for r in checkpoint.tensors.values() if r.file in shared)


def experts_bit_exact(base: Checkpoint, model: Checkpoint) -> bool:
    """Return whether the model contains every expert tensor of the base, byte for byte."""
    names = [name for name in base.tensors if ".mlp.experts." in name]
    return all(name in model.tensors and same_bytes(base, model, name) for name in names)


def masters_match(model: Checkpoint, masters: Path, fmt: DenseFormat) -> bool:
    """Return whether rounding the masked masters gives the stored codes, bit for bit."""
    for layer in range(model.config["num_hidden_layers"]):
        kept = load_file(masters / f"layer-{layer:05d}.safetensors")
        for full, tensors in stored_projections(model, layer).items():
            master = kept[f"{full}.weight"]
            mask = dense.unpack_mask(fmt, tensors)
            masked = master if mask is None else torch.where(mask, master, 0)
            if fmt.is_quantized:
                masked = integer.quantize(masked, tensors["weight_scale"], fmt.weight_bits)
            if not torch.equal(masked, dense.unpack_values(fmt, tensors)):
                return False
    return True


def measure(base: Checkpoint, model: Checkpoint, masters: Path) -> dict[str, Any]:
    """Return the manifest's figures on sizes and exactness.

    `bytes_on_disk` counts the tensors named in the index; `bytes_linked` counts those in files
    shared with the base, which take no additional disk space.
    """
    fmt = SparseLongConfig(**model.config["quantization_config"]).dense_format
    sizes, counts = _bytes_by_group(model), _weights_by_group(base)
    figures = {
        "bytes_on_disk": sum(sizes.values()),
        "base_bytes_on_disk": sum(_bytes_by_group(base).values()),
        "bytes_linked": _linked_bytes(model),
        "bits_per_weight": {g: round(8 * sizes[g] / counts[g], 4) for g in sorted(sizes)},
        "experts_bit_exact": experts_bit_exact(base, model),
        "two_four_conforming": two_four_conforming(model),
    }
    if fmt.is_sparse or fmt.is_quantized:
        figures["masters_match"] = masters_match(model, masters, fmt)
    return figures


def add_seconds(records: Iterable[Mapping[str, Any]], base_hash: float) -> dict[str, float]:
    """Return seconds by part of the work, of all layers.

    The computation takes the sum of `load`, `calibrate`, `solve`, `pack`, `forward` and `wait` (for
    the layer before to be written); `read`, `write` and `hash` run beside it.

    Args:
        records: the layers' records.
        base_hash: seconds of hashing the base's files, a part of `hash`.
    """
    total = {"hash": base_hash}
    for record in records:
        for part, seconds in record["seconds"].items():
            total[part] = total.get(part, 0.0) + seconds
    return {part: round(seconds, 3) for part, seconds in total.items()}
