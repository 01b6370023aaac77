"""Packed weights of one layer's experts, in the form that all expert kernels take.

MXFP4 as the checkpoint stores it: 16 bytes hold the 4-bit codes of 32 consecutive weights, and one
byte is the exponent of their shared scale. Nothing here copies or decodes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class PackedWeight(NamedTuple):
    """One projection of every expert, y = x W[e]^T + bias[e].

    Attributes:
        blocks: uint8 [experts, out, in / 32, 16], contiguous.
        scales: uint8 [experts, out, in / 32], contiguous; not checked for 255, which is NaN.
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
        """Raise if the tensors do not match each other or the tokens.

        Args:
            x: [tokens, hidden], on the device where the stack must be.

        Raises:
            ValueError: A tensor does not fit; the message names it.
        """
        hidden, (experts, rows) = x.shape[1], self.gate_up.blocks.shape[:2]
        if hidden % 32:
            raise ValueError(f"x: hidden size {hidden}; allowed: a multiple of 32")
        if rows % 64:
            raise ValueError(f"stack.gate_up.blocks: {rows} rows; allowed: a multiple of 64")
        for name, weight, out, groups in (
            ("gate_up", self.gate_up, rows, hidden // 32),
            ("down", self.down, hidden, rows // 64),
        ):
            shapes = ((experts, out, groups, 16), (experts, out, groups), (experts, out))
            for part, tensor, shape in zip(weight._fields, weight, shapes, strict=True):
                _check(f"stack.{name}.{part}", tensor, shape, x.device)


class Gate(NamedTuple):
    """Constants of gpt-oss's gate, (clip(up) + 1) * gate * sigmoid(alpha * gate).

    Attributes:
        alpha: factor of the gate inside the sigmoid.
        limit: upper bound of gate, and bound of up's absolute value.
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
