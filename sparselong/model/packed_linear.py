"""Linear layer whose weight stays packed: 2:4 kept codes, mask patterns and scales.

The weight is decoded in every forward and backward pass and never kept: the dense layers of gpt-oss
are under 1 % of its weights, so decoding costs little, and bf16 copies would undo the saving. For
few rows on a GPU, as in generation, a 4-bit weight is multiplied in packed form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparselong.kernels import make_opaque
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


class StoredBuffers(nn.Module):
    """Module whose buffers are what a file holds: moved with the model, never converted.

    `model.half()` and `.to(dtype)` convert parameters. Scales of another dtype would be other bits,
    which kernels cannot read.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        stored = dict(self._buffers)
        self._buffers.clear()
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(stored)
        for name, tensor in stored.items():
            if tensor is not None:  # no conversion applies to bytes
                self._buffers[name] = fn(tensor.view(torch.uint8)).view(tensor.dtype)
        return self


class PackedLinear(StoredBuffers):
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
        return _decode(self.fmt, self.packed())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out] in x's dtype."""
        if torch.compiler.is_compiling():
            packed = self.packed()
            tensors = (x, self.bias, list(packed.values()))
            constants = (" ".join(packed), self.fmt.weight_bits, self.fmt.sparsity)
            return _packed_linear_operator(
                *tensors, *constants, self.fmt.group_size, _trains(x, self.bias)
            )
        if not _trains(x, self.bias) and _is_small(x, self.fmt):
            return _multiply_few(x, self.fmt, self.packed(), self.bias)
        return decoded_linear(x, lambda dtype: self.dequantize().to(dtype), self.bias)

    def extra_repr(self) -> str:
        """Return the shape and format for the module's repr."""
        return f"{self.in_features}, {self.out_features}, {self.fmt}"


def _decode(fmt: DenseFormat, packed: dict[str, torch.Tensor]) -> torch.Tensor:
    if packed["weight_packed"].is_cuda and fmt.weight_bits == 4:
        from sparselong.kernels.dense import unpack_weight

        return unpack_weight(fmt, packed)
    return dense.unpack(fmt, packed)


def _trains(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    needed = x.requires_grad or (bias is not None and bias.requires_grad)
    return torch.is_grad_enabled() and needed


def _is_small(x: torch.Tensor, fmt: DenseFormat) -> bool:
    """Return whether `packed_gemv` can take the call, if it needs no gradients."""
    few = 0 < x.numel() <= MOST_TOKENS * x.shape[-1]
    return x.is_cuda and x.dtype == torch.bfloat16 and few and fmt.weight_bits == 4


def _multiply_few(
    x: torch.Tensor, fmt: DenseFormat, packed: dict[str, torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    from sparselong.kernels.decode import packed_gemv

    rows = x.reshape(-1, x.shape[-1])
    return packed_gemv(rows, fmt, packed, bias).view(*x.shape[:-1], -1)


def _packed_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    tensors: list[torch.Tensor],
    names: str,
    weight_bits: int,
    sparsity: str,
    group_size: int,
    trains: bool,
) -> torch.Tensor:
    """Return the product for torch.compile: `PackedLinear.forward` of the stored tensors."""
    fmt, packed = _read_format(tensors, names, weight_bits, sparsity, group_size)
    if not trains and _is_small(x, fmt):
        return _multiply_few(x, fmt, packed, bias)
    return nn.functional.linear(x, _decode(fmt, packed).to(x.dtype), bias)


def _read_format(
    tensors: list[torch.Tensor], names: str, *constants: Any
) -> tuple[DenseFormat, dict[str, torch.Tensor]]:
    return DenseFormat(*constants), dict(zip(names.split(), tensors, strict=True))


def _like_packed_linear(
    x: torch.Tensor, bias: torch.Tensor | None, tensors: list[torch.Tensor], *_: Any
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], tensors[0].shape[0])


def _differentiate_packed_linear(
    arguments: Any, results: Any, gradients: Any, needs: Any
) -> list[torch.Tensor | None]:
    x, bias, tensors, names, *constants, _ = arguments
    (grad,) = gradients
    weight = _decode(*_read_format(tensors, names, *constants)).to(grad.dtype)
    found: list[torch.Tensor | None] = [grad @ weight if needs[0] else None]
    if bias is not None:
        found.append(grad.flatten(0, -2).sum(0) if needs[1] else None)
    return found + [None] * len(tensors)


_packed_linear_operator = make_opaque(
    _packed_linear, like=_like_packed_linear, differentiate=_differentiate_packed_linear
)
