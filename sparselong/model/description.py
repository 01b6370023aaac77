"""Description of a loaded model's weights: format, dtype and bytes of each group in memory.

It is read from the tensors themselves, so that an expansion to bf16 is visible; transformers
expands silently if it cannot use a packed format.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import nn

from sparselong.figures import format_bytes
from sparselong.model.packed_experts import PackedExperts
from sparselong.model.packed_linear import PackedLinear
from sparselong.model.part import Part, show_rows
from sparselong.model.vocabulary import PartialEmbedding

GROUPS = ("experts", "attention", "embedding and lm_head", "router, norms, biases, sinks")


def describe_weights(model: nn.Module) -> str:
    """Return one line with each group's formats and bytes, the devices, and what part is held.

    Args:
        model: a gpt-oss model, packed or not.
    """
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    seen: set[int] = set()
    devices: set[str] = set()
    for path, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or tensor.data_ptr() in seen:  # tied
                continue
            seen.add(tensor.data_ptr())
            if not (isinstance(module, Part) and module.is_in_host_memory(name)):
                devices.add(str(tensor.device))
            group = _group(path, name)
            sizes[group][_format(module, name, tensor)] += tensor.nbytes
    groups = [
        f"{group}: " + ", ".join(f"{name} {format_bytes(n)}" for name, n in sizes[group].items())
        for group in GROUPS
        if group in sizes
    ]
    found = "; ".join(groups + _held_parts(model))
    return f"weights as loaded on {', '.join(sorted(devices))}: {found}"


def _held_parts(model: nn.Module) -> list[str]:
    """Return which experts and vocabulary rows the model holds, if not all."""
    kinds: dict[type, str] = {PackedExperts: "experts", PartialEmbedding: "vocabulary rows"}
    parts = [m for m in model.modules() if isinstance(m, Part) and not m.is_whole]
    found = {(kinds.get(type(part)), show_rows(part.held), part.total) for part in parts}
    return sorted(f"only {name} {rows} of {total}" for name, rows, total in found if name)


def _group(path: str, name: str) -> str:
    last = path.rpartition(".")[2]
    if name.endswith("bias") or name == "sinks":
        return GROUPS[3]
    if last == "experts":
        return GROUPS[0]
    if ".self_attn." in path:
        return GROUPS[1]
    return GROUPS[2] if last in ("embed_tokens", "lm_head") else GROUPS[3]


def _format(module: nn.Module, name: str, tensor: torch.Tensor) -> str:
    if isinstance(module, PackedExperts) and not name.endswith("bias"):
        return "MXFP4, packed" + ", in host memory" * module.is_on_host
    if isinstance(module, PackedLinear) and name != "bias":
        bits, fmt = module.fmt.weight_bits, module.fmt
        kind = f"int{bits}" if fmt.is_quantized else "bf16"
        return f"{kind} 2:4, packed" if fmt.is_sparse else f"{kind}, packed"
    expanded = type(module).__name__ == "GptOssExperts" and not name.endswith("bias")
    return str(tensor.dtype).removeprefix("torch.") + (", not packed" if expanded else "")
