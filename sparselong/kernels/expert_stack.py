"""The packed weights of one layer's experts, as every kernel that reads them takes them.

MXFP4 as the checkpoint stores it: 16 bytes hold the 4-bit codes of 32 weights in a row, and one
byte is the exponent of their common scale. Nothing here copies or decodes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class PackedWeight(NamedTuple):
    """One projection of every expert, y = x W[e]^T + bias[e].

    Attributes:
        blocks: uint8 [experts, out, in / 32, 16], contiguous.
        scales: uint8 [experts, out, in / 32], contiguous; byte 255, NaN, is not looked for.
        bias: floating [experts, out], contiguous.
    """

    blocks: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor


class ExpertStack(NamedTuple):
    """The experts of one layer.

    Attributes:
        gate_up: hidden to 2 * inner; row 2j is gate j, row 2j + 1 is up j.
        down: inner to hidden.
    """

    gate_up: PackedWeight
    down: PackedWeight

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.gate_up.blocks.shape[0]

    def check(self, x: torch.Tensor) -> None:
        """Raise if the tensors do not fit one another or the tokens.

        Args:
            x: [tokens, hidden], on the device that the stack must be on.

        Raises:
            ValueError: names the tensor, what was found and what is allowed.
        """
        hidden, (experts, wide) = x.shape[1], self.gate_up.blocks.shape[:2]
        if hidden % 32:
            raise ValueError(f"x: hidden size {hidden}; allowed: a multiple of 32")
        if wide % 64:
            raise ValueError(f"stack.gate_up.blocks: {wide} rows; allowed: a multiple of 64")
        for name, weight, out, groups in (
            ("gate_up", self.gate_up, wide, hidden // 32),
            ("down", self.down, hidden, wide // 64),
        ):
            shapes = ((experts, out, groups, 16), (experts, out, groups), (experts, out))
            for part, tensor, shape in zip(weight._fields, weight, shapes, strict=True):
                _check(f"stack.{name}.{part}", tensor, shape, x.device)


class Gate(NamedTuple):
    """Constants of gpt-oss's gate, (clip(up) + 1) * gate * sigmoid(alpha * gate).

    Attributes:
        alpha: factor of the gate inside the sigmoid.
        limit: gate is at most this, and up at most this in size.
    """

    alpha: float
    limit: float


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {list(tensor.shape)}; allowed: {list(shape)}")
    packed = not name.endswith("bias")
    if (tensor.dtype != torch.uint8) if packed else not tensor.is_floating_point():
        allowed = "torch.uint8" if packed else "floating"
        raise ValueError(f"{name}: {tensor.dtype}; allowed: {allowed}")
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}; allowed: x's device, {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {list(tensor.stride())}; allowed: contiguous")
