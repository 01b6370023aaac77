"""Sizes and exactness of the compressed checkpoint, measured on the written files.

`predict` gives the same sizes before anything is written, from the names, dtypes and shapes of what
stage 02 stores (checkpoint/layout.py), which the stage compares with its files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from transformers import GptOssConfig

from sparselong.checkpoint import (
    Checkpoint,
    Shapes,
    count_bytes,
    master_tensors,
    model_tensors,
    read_header,
    same_base_bytes,
    stored_tensors,
)
from sparselong.figures import format_bytes
from sparselong.model import SparseLongConfig, stored_projections, two_four_conforming
from sparselong.packing import DenseFormat, dense, integer

MASTERS = "masters"
"""Group of the dense masters, which are beside the model."""
_GROUPS = {
    ".self_attn.": "attention",
    ".mlp.experts.": "experts",
    "embed_tokens": "embedding",
    "lm_head": "lm_head",
}


class Sizes(NamedTuple):
    """Bytes and bits per weight by group of weights; biases count as weights, scales do not."""

    bytes: dict[str, int]
    bits_per_weight: dict[str, float]

    @property
    def model_bytes(self) -> int:
        """Bytes of the model's tensors, without the masters."""
        return sum(size for group, size in self.bytes.items() if group != MASTERS)


def predict(architecture: GptOssConfig, quantization: SparseLongConfig) -> Sizes:
    """Return the sizes of what stage 02 stores.

    Args:
        architecture: of the compressed model: with the experts that are kept.
        quantization: the formats.
    """
    fmt = quantization.dense_format
    stored = stored_tensors(architecture, fmt, quantization.expert_sparsity)
    masters = master_tensors(architecture, fmt)
    sizes = {name: count_bytes({name: row}) for name, row in stored.items()}
    return _sizes(architecture, sizes, count_bytes(masters), masters)


def measure_sizes(model: Checkpoint, masters: Path) -> Sizes:
    """Return the sizes of a compressed model's files, and of the masters beside it."""
    document = dict(model.config)
    fmt = SparseLongConfig(**document.pop("quantization_config")).dense_format
    architecture = GptOssConfig(**document)
    sizes = {name: record.end - record.begin for name, record in model.tensors.items()}
    records = [record for path in masters.glob("layer-*") for record in read_header(path).values()]
    master_bytes = sum(record.end - record.begin for record in records)
    return _sizes(architecture, sizes, master_bytes, master_tensors(architecture, fmt))


def _sizes(
    architecture: GptOssConfig, sizes: Mapping[str, int], master_bytes: int, masters: Shapes
) -> Sizes:
    groups = _sum_groups(sizes)
    counts = _sum_groups(
        {
            name: _count_weights(name, shape)
            for name, (_, shape) in model_tensors(architecture).items()
        }
    )
    if masters:
        groups[MASTERS] = master_bytes
        counts[MASTERS] = sum(math.prod(shape) for _, shape in masters.values())
    bits = {group: round(8 * groups[group] / counts[group], 4) for group in groups}
    return Sizes(groups, bits)


def _sum_groups(values: Mapping[str, int]) -> dict[str, int]:
    """Sum values of tensors by group, in the groups' alphabetical order."""
    sums: dict[str, int] = {}
    for name, value in values.items():
        group = next((one for part, one in _GROUPS.items() if part in name), "router_and_norms")
        sums[group] = sums.get(group, 0) + value
    return dict(sorted(sums.items()))


def _count_weights(name: str, shape: tuple[int, ...]) -> int:
    """Count a published tensor's weights: two per byte of MXFP4 blocks, none per scale."""
    count = math.prod(shape)
    return 2 * count if name.endswith("_blocks") else 0 if name.endswith("_scales") else count


def describe_sizes(metrics: Mapping[str, Any]) -> str:
    """Return one line with `measure`'s sizes."""
    bits = metrics["bits_per_weight"].items()
    shown = ", ".join(f"{group.replace('_', ' ')} {each:.4g}" for group, each in bits)
    size, base = (format_bytes(metrics[key]) for key in ("bytes_on_disk", "base_bytes_on_disk"))
    return f"{size}, the base {base}; bits per weight: {shown}"


def _linked_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of tensors in files shared with another directory."""
    shared = {f for f in checkpoint.files if (checkpoint.directory / f).stat().st_nlink > 1}
    return sum(r.end - r.begin for r in checkpoint.tensors.values() if r.file in shared)


def experts_bit_exact(base: Checkpoint, model: Checkpoint) -> bool:
    """Return whether the model's experts are the base's, or those that it keeps, byte for byte."""
    names = [name for name in base.tensors if ".mlp.experts." in name]
    return all(name in model.tensors and same_base_bytes(model, base, name) for name in names)


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
    sizes = measure_sizes(model, masters)
    figures = {
        "bytes_on_disk": sizes.model_bytes,
        "base_bytes_on_disk": sum(r.end - r.begin for r in base.tensors.values()),
        "bytes_linked": _linked_bytes(model),
        "bits_per_weight": sizes.bits_per_weight,
        "experts_bit_exact": experts_bit_exact(base, model),
        "two_four_conforming": two_four_conforming(model),
    }
    if fmt.is_packed:
        figures["masters_match"] = masters_match(model, masters, fmt)
    return figures


def add_seconds(records: Iterable[Mapping[str, Any]], base_hash: float) -> dict[str, float]:
    """Return seconds by part of the work, of all layers.

    The computation takes the sum of `load`, `calibrate`, `solve`, `refine`, `pack`, `score` (of
    experts, if some are dropped), `forward` and `wait` (for the layer before to be written);
    `read`, `write` and `hash` run beside it.

    Args:
        records: the layers' records.
        base_hash: seconds of hashing the base's files, a part of `hash`.
    """
    total = {"hash": base_hash}
    for record in records:
        for part, seconds in record["seconds"].items():
            total[part] = total.get(part, 0.0) + seconds
    return {part: round(seconds, 3) for part, seconds in total.items()}
