"""Packed weights of one layer's experts, in the form that all expert kernels take.

MXFP4 as the checkpoint stores it: 16 bytes hold the 4-bit codes of 32 consecutive weights, and one
byte is the exponent of their shared scale. Nothing here copies or decodes.

A layer's experts lie on the device (`ExpertStack`) or, but for their biases, in host memory
(`HostStack`). A pass takes either: it calls `fetch` once, uses what that returns until all its work
is enqueued, and keeps none of it: the next layer's `fetch` may overwrite it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

Passing = Literal["forward", "backward", "inference"]
"""Which pass fetches a layer: a forward pass that a backward pass follows, that backward pass, or a
forward pass without one. It says which layer is needed next."""


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

    def fetch(self, passing: Passing) -> ExpertStack:
        """Return the stack itself: it is on the device in every pass."""
        return self

    def in_place(self) -> ExpertStack:
        """Return the stack itself."""
        return self

    def check(self, x: torch.Tensor) -> None:
        """Raise if the tensors do not match each other or the tokens.

        Args:
            x: [tokens, hidden], on the device where the stack must be.

        Raises:
            ValueError: A tensor does not fit; the message names it.
        """
        _check_weights(self, x, x.device)


class HostStack(NamedTuple):
    """The experts of one layer, with blocks and scales in host memory and biases on the device.

    Attributes:
        gate_up: as in `ExpertStack`.
        down: as in `ExpertStack`.
        device: to which `copy` brings blocks and scales.
        copy: returns gate_up's blocks and scales and down's on the device, for one pass.
    """

    gate_up: PackedWeight
    down: PackedWeight
    device: torch.device
    copy: Callable[[Passing], tuple[torch.Tensor, ...]]

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.gate_up.blocks.shape[0]

    def fetch(self, passing: Passing) -> ExpertStack:
        """Return the layer on the device; valid until the next layer is fetched."""
        blocks, scales, down_blocks, down_scales = self.copy(passing)
        return ExpertStack(
            PackedWeight(blocks, scales, self.gate_up.bias),
            PackedWeight(down_blocks, down_scales, self.down.bias),
        )

    def in_place(self) -> ExpertStack:
        """Return the layer as it lies, for kernels that read a few experts from host memory.

        A GPU reads it where it is page-locked.
        """
        return ExpertStack(self.gate_up, self.down)

    def check(self, x: torch.Tensor) -> None:
        """Raise as `ExpertStack.check`, or if the tokens are on another device than `device`."""
        if x.device != self.device:
            raise ValueError(
                f"x: on {x.device}; allowed: {self.device}, for which the model was opened with "
                "its experts in host memory"
            )
        _check_weights(self, x, torch.device("cpu"))


class Gate(NamedTuple):
    """Constants of gpt-oss's gate, (clip(up) + 1) * gate * sigmoid(alpha * gate).

    Attributes:
        alpha: factor of the gate inside the sigmoid.
        limit: upper bound of gate, and bound of up's absolute value.
    """

    alpha: float
    limit: float


def _check_weights(
    stack: ExpertStack | HostStack, x: torch.Tensor, packed_on: torch.device
) -> None:
    """Raise unless the tensors fit each other and the tokens, and blocks and scales lie there."""
    hidden, (experts, rows) = x.shape[1], stack.gate_up.blocks.shape[:2]
    if hidden % 32:
        raise ValueError(f"x: hidden size {hidden}; allowed: a multiple of 32")
    if rows % 64:
        raise ValueError(f"stack.gate_up.blocks: {rows} rows; allowed: a multiple of 64")
    for name, weight, out, groups in (
        ("gate_up", stack.gate_up, rows, hidden // 32),
        ("down", stack.down, hidden, rows // 64),
    ):
        shapes = ((experts, out, groups, 16), (experts, out, groups), (experts, out))
        for part, tensor, shape in zip(weight._fields, weight, shapes, strict=True):
            _check(f"stack.{name}.{part}", tensor, shape)
            device = x.device if part == "bias" else packed_on
            if tensor.device != device:
                where = "x's device" if device == x.device else "host memory"
                raise ValueError(
                    f"stack.{name}.{part}: on {tensor.device}; allowed: {where}, {device}"
                )


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {list(tensor.shape)}; allowed: {list(shape)}")
    packed = not name.endswith("bias")
    if (tensor.dtype != torch.uint8) if packed else not tensor.is_floating_point():
        allowed = "torch.uint8" if packed else "floating"
        raise ValueError(f"{name}: {tensor.dtype}; allowed: {allowed}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {list(tensor.stride())}; allowed: contiguous")
