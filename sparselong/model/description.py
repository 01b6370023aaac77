"""Description of a loaded model's weights: format, dtype and bytes of each group in memory.

It is read from the tensors themselves, so that an expansion to bf16 is visible; transformers
expands silently if it cannot use a packed format.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import nn

from sparselong.memory import format_bytes
from sparselong.model.packed_experts import PackedExperts
from sparselong.model.packed_linear import PackedLinear

GROUPS = ("experts", "attention", "embedding and lm_head", "router, norms, biases, sinks")


def describe_weights(model: nn.Module) -> str:
    """Return one line with each group's formats and bytes, and the devices.

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
            devices.add(str(tensor.device))
            group = _group(path, name)
            sizes[group][_format(module, name, tensor)] += tensor.nbytes
    groups = [
        f"{group}: " + ", ".join(f"{name} {format_bytes(n)}" for name, n in sizes[group].items())
        for group in GROUPS
        if group in sizes
    ]
    return f"weights as loaded on {', '.join(sorted(devices))}: {'; '.join(groups)}"


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
        return "MXFP4, packed"
    if isinstance(module, PackedLinear) and name != "bias":
        bits, fmt = module.fmt.weight_bits, module.fmt
        kind = f"int{bits}" if fmt.is_quantized else "bf16"
        return f"{kind} 2:4, packed" if fmt.is_sparse else f"{kind}, packed"
    expanded = type(module).__name__ == "GptOssExperts" and not name.endswith("bias")
    return str(tensor.dtype).removeprefix("torch.") + (", not packed" if expanded else "")
