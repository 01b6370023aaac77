"""A linear layer whose weight stays packed: 2:4 kept codes, mask patterns and scales.

The weight is decoded on every forward and backward, and never kept: the dense layers of gpt-oss are
under 1 % of its weights, so decoding costs little and holding bf16 copies would undo the saving.
"""

from __future__ import annotations

import torch
from torch import nn

from sparselong.packing import dense
from sparselong.packing.dense import DenseFormat


class _DecodedLinear(torch.autograd.Function):
    """y = x Wᵀ + b with W decoded anew in the backward pass; W is frozen."""

    @staticmethod
    def forward(ctx, x, decode, bias):  # type: ignore[override]
        ctx.decode, ctx.has_bias = decode, bias is not None
        return nn.functional.linear(x, decode(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        grad_x = grad @ ctx.decode(grad.dtype) if ctx.needs_input_grad[0] else None
        needs_bias = ctx.has_bias and ctx.needs_input_grad[2]
        return grad_x, None, grad.flatten(0, -2).sum(0) if needs_bias else None


def decoded_linear(x: torch.Tensor, decode, bias: torch.Tensor | None) -> torch.Tensor:
    """Linear layer over a frozen weight that is decoded when needed and then dropped.

    Args:
        x: [..., in].
        decode: dtype → weight [out, in]; must return the same values every time.
        bias: [out] or None.

    Returns:
        [..., out]; differentiable in x and bias.
    """
    return _DecodedLinear.apply(x, decode, bias)  # type: ignore[return-value]


class PackedLinear(nn.Module):
    """Frozen linear layer stored in a `DenseFormat`.

    Args:
        in_features, out_features: shape of the dense weight, [out, in].
        bias: whether there is a bias.
        fmt: the storage format.

    Raises:
        ValueError: the format cannot store that many input features.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, fmt: DenseFormat):
        super().__init__()
        fmt.check("PackedLinear", in_features)
        self.in_features, self.out_features, self.fmt = in_features, out_features, fmt
        for name, tensor in fmt.empty(out_features, in_features).items():
            self.register_buffer(name, tensor)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def packed(self) -> dict[str, torch.Tensor]:
        """The stored tensors by name, without the bias."""
        return {name: buffer for name, buffer in self.named_buffers()}

    def dequantize(self) -> torch.Tensor:
        """The bf16 weight [out, in] that the stored tensors mean."""
        return dense.unpack(self.fmt, self.packed())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out] in x's dtype."""
        return decoded_linear(x, lambda dtype: self.dequantize().to(dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.fmt}"
