"""Linear layer whose weight stays packed: 2:4 kept codes, mask patterns and scales.

The weight is decoded in every forward and backward pass and never kept: the dense layers of gpt-oss
are under 1 % of its weights, so decoding costs little, and bf16 copies would undo the saving. For
few rows on a GPU, as in generation, a 4-bit weight is multiplied in packed form.
"""

from __future__ import annotations

import torch
from torch import nn

from sparselong.packing import DenseFormat, dense

MOST_TOKENS = 8
"""Most rows for which the weight is multiplied in packed form."""


class _DecodedLinear(torch.autograd.Function):
    """y = x Wᵀ + b with a frozen W that is decoded again in the backward pass."""

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
    """Apply a linear layer whose frozen weight is decoded when needed and then freed.

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
        in_features: columns of the dense weight.
        out_features: rows of the dense weight.
        bias: whether there is a bias.
        fmt: storage format.

    Raises:
        ValueError: The format cannot store `in_features` columns.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, fmt: DenseFormat):
        super().__init__()
        fmt.check("PackedLinear", in_features)
        self.in_features, self.out_features, self.fmt = in_features, out_features, fmt
        for name, tensor in fmt.empty(out_features, in_features).items():
            self.register_buffer(name, tensor)
        self.weight_packed: torch.Tensor
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def packed(self) -> dict[str, torch.Tensor]:
        """Return the stored tensors by name, without the bias."""
        return {name: buffer for name, buffer in self.named_buffers()}

    def dequantize(self) -> torch.Tensor:
        """Decode the stored tensors to the bf16 weight [out, in]."""
        if self.weight_packed.is_cuda and self.fmt.weight_bits == 4:
            from sparselong.kernels.dense import unpack_weight

            return unpack_weight(self.fmt, self.packed())
        return dense.unpack(self.fmt, self.packed())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out] in x's dtype."""
        if self._is_small(x):
            from sparselong.kernels.decode import packed_gemv

            rows = x.reshape(-1, self.in_features)
            return packed_gemv(rows, self.fmt, self.packed(), self.bias).view(*x.shape[:-1], -1)
        return decoded_linear(x, lambda dtype: self.dequantize().to(dtype), self.bias)

    def _is_small(self, x: torch.Tensor) -> bool:
        """Return whether `packed_gemv` can take the call."""
        trains = torch.is_grad_enabled() and (
            x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        )
        few = 0 < x.numel() <= MOST_TOKENS * self.in_features
        on_gpu = x.is_cuda and x.dtype == torch.bfloat16
        return on_gpu and few and not trains and self.fmt.weight_bits == 4

    def extra_repr(self) -> str:
        """Return the shape and format for the module's repr."""
        return f"{self.in_features}, {self.out_features}, {self.fmt}"
