"""Which tensors a gpt-oss GGUF file has: names, types and shapes, and where each comes from.

Names are llama.cpp's. gate_up_proj is interleaved in the published form, even rows are gate's and
odd ones up's; the file has them apart. Vectors, biases and the router are f32 because llama.cpp
computes with them in f32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from sparselong.checkpoint import Shapes
from sparselong.export.gguf.types import type_for_rows

ALIGNMENT = 32
"""Bytes to multiples of which GGUF pads a tensor."""
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "post_attention_norm",
    "mlp.router": "ffn_gate_inp",
}
_SINKS = "self_attn.sinks"
_EXPERTS = {
    "gate_up_proj": (("ffn_gate_exps", slice(0, None, 2)), ("ffn_up_exps", slice(1, None, 2))),
    "down_proj": (("ffn_down_exps", slice(None)),),
}
"""File's name and rows of each expert weight."""


class Tensor(NamedTuple):
    """A tensor of the file.

    Attributes:
        name: in the file.
        kind: its GGML type.
        shape: with the rows' length last; the file lists it the other way round.
        source: published name; of experts' weights without `_blocks`.
        rows: of an expert's weight or bias, which of the source's.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    source: str
    rows: slice = slice(None)

    @property
    def size(self) -> int:
        """Bytes without padding."""
        import gguf

        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        return math.prod(self.shape) // block * size


def list_tensors(shapes: Shapes, choice: str) -> list[Tensor]:
    """Return the file's tensors in its order.

    Args:
        shapes: published tensors, see `checkpoint.model_tensors`.
        choice: type of the dense weights, a key of `DENSE_TYPES`.
    """
    tensors: list[Tensor] = []
    for name, (_, shape) in shapes.items():
        if name in _WHOLE:
            tensors.append(_plain(_WHOLE[name], name, shape, choice))
        else:
            _, _, layer, inner = name.split(".", 3)
            tensors += _in_layer(f"blk.{layer}", inner, name, shape, choice)
    return tensors


def _in_layer(
    prefix: str, inner: str, name: str, shape: tuple[int, ...], choice: str
) -> list[Tensor]:
    """Return the tensors of the file that a layer's published tensor becomes."""
    if inner == _SINKS:
        return [Tensor(f"{prefix}.attn_sinks.weight", "F32", shape, name)]
    module, _, last = inner.rpartition(".")
    if module in _IN_LAYER:
        return [_plain(f"{prefix}.{_IN_LAYER[module]}.{last}", name, shape, choice)]
    weight, _, kind = last.rpartition("_")
    source = name.removesuffix("_blocks")
    found = []
    for stem, rows in _EXPERTS[weight] if kind != "scales" else ():
        count = len(range(*rows.indices(shape[1])))
        if kind == "bias":
            found.append(Tensor(f"{prefix}.{stem}.bias", "F32", (shape[0], count), name, rows))
        else:
            full = (shape[0], count, 32 * shape[2])
            found.append(Tensor(f"{prefix}.{stem}.weight", "MXFP4", full, source, rows))
    return found


def _plain(name: str, source: str, shape: tuple[int, ...], choice: str) -> Tensor:
    is_dense = len(shape) == 2 and "ffn_gate_inp" not in name
    return Tensor(name, type_for_rows(choice, shape[-1]) if is_dense else "F32", shape, source)


def padded(size: int) -> int:
    """Return a size rounded up to the file's alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT
