"""The tensors of a compressed or fine-tuned model under their published names, piece by piece.

Stages 02 and 03 store attention projections as codes, masks and scales, and may store experts as
kept codes and patterns; all other tensors are stored in published form. `parts` yields a published
tensor in slices of its first dimension, so that no large one is ever whole in memory: tensors
stored in published form byte for byte, projections decoded to the bf16 values that the model
computes with, experts as MXFP4 blocks and scales. `decoded_experts` yields experts as transformers
holds them in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import GptOssConfig

from sparselong.checkpoint import (
    Checkpoint,
    Shapes,
    model_tensors,
    unpack_two_four_experts,
)
from sparselong.errors import StageError
from sparselong.model import SparseLongConfig
from sparselong.packing import dense, mxfp4

EXPERTS = ("gate_up_proj", "down_proj")
_STORED = ("weight_packed", "weight_mask", "weight_scale")
_PACKED_EXPERTS = ("kept", "patterns")


class Source:
    """An opened model of stage 02 or 03.

    Args:
        directory: the model's directory.
        device: where experts are decoded.

    Attributes:
        shapes: safetensors dtype and shape of each tensor by published name.
    """

    def __init__(self, directory: Path, device: torch.device):
        self.checkpoint, self.device = Checkpoint(directory), device
        document = dict(self.checkpoint.config)
        self._fmt = SparseLongConfig(**document.pop("quantization_config")).dense_format
        self.architecture = GptOssConfig(**document)
        self.shapes: Shapes = model_tensors(self.architecture)

    def parts(self, name: str, step: int | None = None) -> Iterator[torch.Tensor]:
        """Yield a tensor by its published name, in slices of its first dimension.

        Args:
            name: the published name.
            step: rows of a slice; None takes as many as fit in 64 MiB. Ignored for projections,
                which are yielded whole.
        """
        tensors, stem = self.checkpoint.tensors, name.removesuffix("_blocks")
        if name in tensors:
            yield from self.checkpoint.read_slices(name, step=step)
        elif stem != name and f"{stem}_kept" in tensors:
            read = (self.checkpoint.read_slices(f"{stem}_{p}", step=1) for p in _PACKED_EXPERTS)
            for kept, patterns in zip(*read, strict=True):
                yield unpack_two_four_experts(kept, patterns)
        else:
            yield self._projection(name)

    def _projection(self, name: str) -> torch.Tensor:
        """Return a packed projection's bf16 weight [out, in], as the model computes with it."""
        module = name.removesuffix(".weight")
        names = [f"{module}.{part}" for part in _STORED]
        found = self.checkpoint.read(each for each in names if each in self.checkpoint.tensors)
        return dense.unpack(self._fmt, {each.rpartition(".")[2]: t for each, t in found.items()})

    def decoded_experts(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a stack's weights expert by expert, bf16 [1, in, out]; every value is exact.

        Args:
            name: `model.layers.N.mlp.experts.gate_up_proj`, or `…down_proj`.

        Raises:
            StageError: a value is too large for bf16.
        """
        read = (self.parts(f"{name}_{part}", step=1) for part in ("blocks", "scales"))
        for blocks, scales in zip(*read, strict=True):
            values = decode_exactly(blocks.to(self.device), scales.to(self.device))
            if not all(bool(torch.isfinite(limit)) for limit in torch.aminmax(values)):
                raise StageError(
                    f"{name} of {self.checkpoint.directory} cannot be stored in bf16",
                    "finite values",
                    "values beyond bf16's largest",
                    "export it as mxfp4, which keeps the bytes",
                )
            yield values.transpose(1, 2).contiguous().cpu()


def decode_exactly(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the bf16 values of MXFP4 weights; those beyond bf16's range are infinite.

    The values are those of `mxfp4.decode`, in a quarter of its time: a byte is looked up as the two
    values that it holds, and a product with a power of two is exact. The smallest one, half of
    2^-127, is a subnormal of bf16.

    Args:
        blocks: uint8 [..., K/32, 16].
        scales: uint8 [..., K/32].

    Returns:
        bf16 [..., K].
    """
    byte = torch.arange(256)
    values = torch.tensor(mxfp4.VALUES, dtype=torch.bfloat16)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), -1).view(torch.int32).flatten()
    powers = torch.ldexp(torch.ones(256), byte - 127).to(torch.bfloat16)
    powers[mxfp4.NAN_SCALE] = torch.nan
    found, scale = (
        table.to(blocks.device).index_select(0, codes.flatten().int())
        for table, codes in ((pairs, blocks), (powers, scales))
    )
    grouped = found.view(torch.bfloat16).view(*scales.shape, mxfp4.BLOCK)
    return (grouped * scale.view(*scales.shape, 1)).flatten(-2)
