"""Comparing a checkpoint's tensors with those of a model, before transformers loads them.

transformers only warns about tensors that are missing, which it leaves uninitialized, and about
tensors that the model lacks. It does not check shapes of buffers, and puts on any adapter that it
finds beside the model. The quantizer therefore calls `refuse_mismatch` whenever a packed model is
opened, by whatever trainer or script.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from sparselong.checkpoint import KEPT_BYTES, PATTERN_BYTES, Inventory, take_inventory
from sparselong.errors import StageError
from sparselong.model.part import Part

_DTYPES = {
    **{"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64},
    **{"U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32},
    **{"I64": torch.int64, "BOOL": torch.bool},
}
_FIX = "download the checkpoint again, or redo the stage that wrote it"


def refuse_mismatch(model: nn.Module, files: Iterable[str], sparse_experts: bool) -> None:
    """Raise unless the files hold exactly the model's tensors.

    Args:
        model: the model with packed modules, whose tensors may be on the meta device.
        files: the weight files that are about to be loaded, all in one directory.
        sparse_experts: whether experts are stored as kept codes and patterns.

    Raises:
        StageError: a tensor is missing, unexpected, or of another shape or type; an adapter or
            other weights lie beside the model; other files than the checkpoint's would be loaded.
    """
    paths = [Path(file) for file in files]
    directory = paths[0].parent
    inventory = take_inventory(directory)
    if sorted({path.name for path in paths}) != inventory.files:
        raise StageError(
            f"other files would be loaded than the checkpoint {directory} consists of",
            ", ".join(inventory.files),
            ", ".join(sorted(path.name for path in paths)),
            "open the directory without naming weight files, variants or formats",
        )
    wanted = _expected(model, sparse_experts)
    for name, expected in wanted.items():
        _check_tensor(inventory, name, expected)
    extra = sorted(set(inventory.tensors) - set(wanted))
    if extra:
        raise StageError(
            f"{directory} does not match the model's tensors: it holds {extra[0]}",
            f"{len(wanted)} tensors of the model, and no others",
            f"{len(extra)} that the model lacks: {', '.join(extra[:4])}",
            _FIX,
        )


def _check_tensor(
    inventory: Inventory, name: str, expected: tuple[torch.dtype, tuple[int, ...]]
) -> None:
    """Raise unless a tensor is stored in its shape; the model may hold floats in another type."""
    dtype, shape = expected
    record = inventory.tensors.get(name)
    if record is None:
        raise StageError(
            f"{inventory.directory} does not match the model's tensors: {name} is missing",
            f"{dtype} {list(shape)}",
            f"{len(inventory.tensors)} tensors without it",
            _FIX,
        )
    found = _DTYPES.get(record.dtype)
    fits = found is not None and (
        found == dtype or (found.is_floating_point and dtype.is_floating_point)
    )
    if record.shape != shape or not fits:
        raise StageError(
            f"{name} does not have the shape and dtype from config.json",
            f"{dtype} {list(shape)}",
            f"{found or record.dtype} {list(record.shape)}",
            _FIX,
        )


def _expected(
    model: nn.Module, sparse_experts: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of each stored tensor by name, whatever part the model holds."""
    wanted = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, Part):
            shape = (owner.total, *shape[1:])
        if sparse_experts and name.endswith("_proj_blocks"):
            stem = name.removesuffix("_blocks")
            wanted[f"{stem}_kept"] = tensor.dtype, (*shape[:-1], KEPT_BYTES)
            wanted[f"{stem}_patterns"] = tensor.dtype, (*shape[:-1], PATTERN_BYTES)
        else:
            wanted[name] = tensor.dtype, shape
    return wanted
