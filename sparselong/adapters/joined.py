"""The queries', keys' and values' masked projections of one attention as one product.

Three masked LoRA layers (`lora.py`) of the same input are one layer whose outputs follow each other
and with the rows of all of them:

    M = [M_q; M_k; M_v]        B·A = [B_q·A_q; B_k·A_k; B_v·A_v]

Weights, outputs and gradients are those of the three layers, with fewer launches: one rounding, one
product; backward one gradient of the input, one of the weight, and all factors' from that in one.
The layers' masters, masks and scales become views of the joint ones. One kernel rotates queries and
keys and copies the values, and backward another writes the three gradients into the joint one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from sparselong.adapters.lora import MaskedLoraLinear, differentiate_product, round_for_backward
from sparselong.kernels.dense import TILE_ROWS, MaskedWeight
from sparselong.kernels.layer import rotate_back, rotate_projections
from sparselong.model import FusedAttention


def join_projections(model: nn.Module) -> int:
    """Join the projections of every attention whose three layers allow it; return their number.

    Args:
        model: a gpt-oss with masked adapters, whose attention is fused (`sparselong.fuse`).
    """
    joined = 0
    for module in model.modules():
        if isinstance(module, FusedAttention):
            layers = [module.q_proj, module.k_proj, module.v_proj]
            if _can_join(layers):
                module.joined = JoinedProjections(layers, module.head_dim)
                joined += 1
    return joined


def _can_join(layers: Sequence[nn.Module]) -> bool:
    """Return whether the layers are masked, alike, with biases and whole tiles of rows."""
    if not all(isinstance(layer, MaskedLoraLinear) for layer in layers):
        return False
    masked: Any = layers
    alike = {(layer.fmt, layer.adapter()[0].shape[0], layer.adapter()[2]) for layer in masked}
    return len(alike) == 1 and all(
        layer.base_layer.bias is not None and layer.master.shape[0] % TILE_ROWS == 0
        for layer in masked
    )


class JoinedProjections:
    """The joint layer of three projections.

    Args:
        layers: the layers of queries, keys and values; their buffers become views of joint ones.
        head_dim: size of a head.
    """

    def __init__(self, layers: Sequence[Any], head_dim: int):
        self.layers, self.head_dim = tuple(layers), head_dim
        self.sizes = [layer.master.shape[0] for layer in layers]
        self._share_buffers()

    def _share_buffers(self) -> None:
        """Make the layers' buffers views of joint ones."""
        self.buffers: dict[str, torch.Tensor | None] = {}
        for name in ("master", "patterns", "scale"):
            parts = [getattr(layer, name) for layer in self.layers]
            joint = None if parts[0] is None else torch.cat(parts)
            self.buffers[name] = joint
            if joint is not None:
                for layer, part in zip(self.layers, joint.split(self.sizes), strict=True):
                    setattr(layer, name, part)
        self.bias = torch.cat([layer.base_layer.bias for layer in self.layers])

    @property
    def factors(self) -> list[torch.Tensor]:
        """A and B of each layer, in order."""
        return [factor for layer in self.layers for factor in layer.adapter()[:2]]

    @property
    def is_usable(self) -> bool:
        """Whether the layers' adapters are on, and no graph is being compiled: it has the three."""
        if torch.compiler.is_compiling():
            return False
        return not any(layer.disable_adapters for layer in self.layers)

    def weight(self) -> MaskedWeight:
        """Return the joint layer."""
        master, given = self.buffers["master"], cast(Any, self.buffers)
        assert master is not None
        if self.layers[0].master.data_ptr() != master.data_ptr():  # the model has moved
            self._share_buffers()
        (a, b, scaling), *others = (layer.adapter() for layer in self.layers)
        more = tuple((a, b) for a, b, _ in others)
        bits = self.layers[0].bits
        return MaskedWeight(lora_a=a, lora_b=b, scaling=scaling, bits=bits, more=more, **given)

    def __call__(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rotated queries and keys, and values, [batch, heads, tokens, head_dim].

        Args:
            hidden: [batch, tokens, in].
            cos: [batch or 1, tokens, head_dim / 2].
            sin: like cos.
        """
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return _Joined.apply(self, hidden, cos, sin, *self.factors)  # pyright: ignore[reportReturnType]

    def split(self, joint: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return views [batch, heads, tokens, head_dim] of [batch, tokens, all outputs]."""
        shape = (*joint.shape[:2], -1, self.head_dim)
        q, k, v = (part.view(shape).transpose(1, 2) for part in joint.split(self.sizes, -1))
        return q, k, v


class _Joined(torch.autograd.Function):
    """The joint product and the rotation. Saved: as in `lora.py`."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        joined: JoinedProjections,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *factors: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        made_from = joined.weight()
        weight, kept = round_for_backward(made_from)
        ctx.joined, ctx.made_from, ctx.angles = joined, made_from, (cos, sin)
        ctx.save_for_backward(x, *kept)
        made = joined.split(functional.linear(x, weight.to(x.dtype), joined.bias.to(x.dtype)))
        # The values are copied so that queries and keys before their rotation are not kept.
        return rotate_projections(*made, cos, sin)

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        joined, (cos, sin) = ctx.joined, ctx.angles
        grad = dq.new_empty(dq.shape[0], dq.shape[2], sum(joined.sizes))
        rotate_back((dq, dk, dv), cos, sin, joined.split(grad))
        needs_x, needs_factors = ctx.needs_input_grad[1], any(ctx.needs_input_grad[4:])
        dx, factors = differentiate_product(
            ctx.made_from, grad, list(ctx.saved_tensors), needs_x, needs_factors
        )
        return None, dx, None, None, *(factors or [None] * len(joined.factors))
