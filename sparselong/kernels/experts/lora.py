"""Low-rank adapters of the experts, applied alongside their frozen packed weights.

    y = x W[e]^T + bias[e] + s (x A[e]^T) B[e]^T        W: MXFP4, frozen; A, B: trained; s: a scale

for gate_up, down, or both; an absent adapter costs nothing. The two low-rank products are grouped
by expert (`lora_triton.py`) and added to the packed product's output; the weight-sized delta B A is
never materialized. With dy the gradient of y, u = s x A^T and g = s dy B, both with r columns:

    dx = dy W + g A          dA = g^T x          dB = dy^T u          (sums over the expert's rows)

The routing weight w is applied as late as without adapters: down's dy is the gradient before w, so
dw = <dh, h> + <dout, bias> already includes the adapter's share, and w multiplies g and u.

Not supported: dropout, adapters of several users at once, and the `generation` backend (`small`
handles those calls).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from sparselong.kernels.expert_stack import ExpertStack, HostStack, PackedWeight


class Adapter(NamedTuple):
    """Low-rank adapter of one projection of every expert: W[e] + scaling * b[e] @ a[e].

    Attributes:
        a: [experts, r, in], floating, any strides.
        b: [experts, out, r], floating, any strides.
        scaling: s.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    def check(self, name: str, weight: PackedWeight) -> None:
        """Raise if the adapter does not fit the weight.

        Args:
            name: name of the argument, for the message.
            weight: the projection that the adapter changes.

        Raises:
            ValueError: A factor does not fit or the scale is not finite; the message names it.
        """
        if not math.isfinite(self.scaling):
            raise ValueError(f"{name}.scaling: {self.scaling}; allowed: finite")
        experts, out, groups, _ = weight.blocks.shape
        device = weight.bias.device  # blocks may be in host memory
        rank = self.a.shape[1] if self.a.dim() == 3 else 0
        for part, tensor, shape in (
            ("a", self.a, (experts, rank, 32 * groups)),
            ("b", self.b, (experts, out, rank)),
        ):
            fits = tuple(tensor.shape) == shape and rank > 0 and tensor.is_floating_point()
            if not fits or tensor.device != device:
                raise ValueError(
                    f"{name}.{part}: {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
                    f"allowed: floating {list(shape)} on {device}, r > 0"
                )

    def in_dtype(self, dtype: torch.dtype) -> Adapter:
        """Return the adapter with contiguous, detached factors in `dtype` for the kernels."""
        a, b = (tensor.detach().to(dtype).contiguous() for tensor in (self.a, self.b))
        return Adapter(a, b, self.scaling)

    def make_sums(self) -> Adapter:
        """Return zeros to accumulate the factors' gradients: fp32, or fp64 for factors in fp64."""
        a, b = (
            torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            for tensor in (self.a, self.b)
        )
        return Adapter(a, b, self.scaling)


class Adapters(NamedTuple):
    """Adapters of one layer's experts; None leaves a projection unchanged."""

    gate_up: Adapter | None = None
    down: Adapter | None = None

    @property
    def are_absent(self) -> bool:
        """Return whether no projection has an adapter."""
        return self.gate_up is None and self.down is None

    @property
    def factors(self) -> tuple[torch.Tensor | None, ...]:
        """A and B of gate_up, then of down; None where there is no adapter."""
        pairs = ((None, None) if one is None else (one.a, one.b) for one in self)
        return tuple(factor for pair in pairs for factor in pair)

    def check(self, stack: ExpertStack | HostStack) -> None:
        """Raise ValueError if an adapter does not fit its projection; see `Adapter.check`."""
        for name, adapter, weight in zip(self._fields, self, stack[:2], strict=True):
            if adapter is not None:
                adapter.check(f"adapters.{name}", weight)

    def in_dtype(self, dtype: torch.dtype) -> Adapters:
        """Return the adapters, each converted by `Adapter.in_dtype`."""
        return Adapters(*(one and one.in_dtype(dtype) for one in self))

    def make_sums(self) -> Adapters:
        """Return zeros to accumulate each adapter's gradients, by `Adapter.make_sums`."""
        return Adapters(*(one and one.make_sums() for one in self))


NO_ADAPTERS = Adapters()
