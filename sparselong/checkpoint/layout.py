"""Names, dtypes and shapes of all tensors that stage 02 stores, by architecture and formats.

Tensors have the published form, but for attention projections, which are packed (packing/dense.py),
and 2:4 experts, which are kept codes and patterns. Stage 02 compares what it has written with this
table, and sizes are computed from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from transformers import GptOssConfig

from sparselong.checkpoint.architecture import Shapes, model_tensors
from sparselong.checkpoint.format import PROJECTIONS
from sparselong.checkpoint.header import BITS
from sparselong.packing import DenseFormat

KEPT_BYTES, PATTERN_BYTES = 8, 3
"""Bytes of 32 experts' weights in 2:4 form: kept codes and patterns (format.py)."""
_DTYPES = {torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8"}
_PROJECTION_WEIGHTS = tuple(f".self_attn.{name}.weight" for name in PROJECTIONS)


def stored_tensors(config: GptOssConfig, fmt: DenseFormat, expert_sparsity: str) -> Shapes:
    """Return name → (safetensors dtype, shape) of every tensor of the compressed model.

    Args:
        config: the compressed model's architecture.
        fmt: format of the attention projections.
        expert_sparsity: `none` or `2:4`.
    """
    stored: Shapes = {}
    for name, (dtype, shape) in model_tensors(config).items():
        if name.endswith(_PROJECTION_WEIGHTS) and fmt.is_packed:
            with torch.device("meta"):
                parts = fmt.empty(*shape)
            stem = name.removesuffix(".weight")
            stored |= {f"{stem}.{key}": _describe(tensor) for key, tensor in parts.items()}
        elif name.endswith("_blocks") and expert_sparsity == "2:4":
            stem = name.removesuffix("_blocks")
            stored[f"{stem}_kept"] = dtype, (*shape[:-1], KEPT_BYTES)
            stored[f"{stem}_patterns"] = dtype, (*shape[:-1], PATTERN_BYTES)
        else:
            stored[name] = dtype, shape
    return stored


def master_tensors(config: GptOssConfig, fmt: DenseFormat) -> Shapes:
    """Return the same of the dense masters that stage 02 writes for stage 03."""
    found = model_tensors(config).items() if fmt.is_packed else ()
    return {name: row for name, row in found if name.endswith(_PROJECTION_WEIGHTS)}


def count_bytes(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Return the bytes of tensors, without headers."""
    return sum(math.prod(shape) * BITS[dtype] for dtype, shape in shapes.values()) // 8


def _describe(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    return _DTYPES[tensor.dtype], tuple(tensor.shape)
