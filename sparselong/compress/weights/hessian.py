"""Second moments of a projection's inputs, the only statistics that the solvers need.

For a linear layer, the squared output error of replacing W by Ŵ is tr((W−Ŵ) H (W−Ŵ)ᵀ) up to a
factor, with H = 2/n · Σ XᵀX over the n calibration tokens. llmcompressor accumulates the same
matrix but counts sequences instead of tokens. The difference is a constant factor in H that does
not affect the result (dampening is a fraction of H's mean diagonal).

Each call's product is rounded to fp32, and products are summed in fp64. 53 bits hold the exact sum
of parts of 24 bits unless one is 2^29 times smaller than the sum, so H depends neither on the order
of the calls nor on the process that made them.

A projection that reads what compressed ones made has inputs x̂ in place of x. `Drift` accumulates
D = 2/n · Σ (x − x̂) x̂ᵀ likewise, from which factor.py finds the weight that makes up for the change.

Left out: any knowledge of the model. The stage decides which inputs belong to which weight; q, k
and v read the same inputs and can share one matrix.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from sparselong.errors import StageError


class _Moment:
    """Accumulator of 2/n · Σ a bᵀ over the calibration data.

    Args:
        in_features: width of the inputs.
        name: name of the layer or weight, for messages.
        device: device of the sum; inputs are there.

    Attributes:
        total: Σ a bᵀ, fp64 [in, in].
        tokens: number of rows added.
    """

    def __init__(self, in_features: int, name: str, device: torch.device | str = "cpu"):
        self.name, self.tokens = name, 0
        self.total = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)

    @property
    def matrix(self) -> torch.Tensor:
        """The moment, fp32 [in, in]; zeros if no rows were added."""
        return (self.total * (2.0 / max(1, self.tokens))).float()

    def _rows(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return inputs [..., in] as fp32 rows; raise ValueError if they are of another width."""
        in_features = self.total.shape[0]
        if inputs.shape[-1] != in_features or inputs.numel() == 0:
            raise ValueError(
                f"{self.name}: inputs [..., {in_features}] expected, got {tuple(inputs.shape)}"
            )
        return inputs.detach().reshape(-1, in_features).float()

    def _refuse(self, rows: torch.Tensor) -> NoReturn:
        """Raise for rows whose products are not finite."""
        bad_rows = int((~torch.isfinite(rows)).any(dim=-1).sum())
        found = f"NaN or infinity in {bad_rows} of {rows.shape[0]} tokens"
        raise StageError(
            f"calibration inputs of {self.name} are not finite",
            "finite activations in every calibration token, and finite squares",
            found if bad_rows else f"values up to {float(rows.abs().max()):.3g}",
            "check the base model's weights, and use bf16 or fp32 (not fp16) activations",
        )


class Hessian(_Moment):
    """Accumulator of H = 2/n · Σ xxᵀ."""

    @torch.no_grad()
    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs [..., in] of any float dtype; padding must already be removed.

        Raises:
            StageError: the inputs contain NaN or infinity, or are so large that squares overflow.
            ValueError: there are no rows, or their width is not `in_features`.
        """
        rows = self._rows(inputs)
        product = rows.T @ rows
        # A NaN or an infinity reaches its column's sum of squares, which is far quicker to check.
        if not bool(torch.isfinite(product.diagonal()).all()):
            self._refuse(rows)
        self.total += product
        self.tokens += rows.shape[0]


class Drift(_Moment):
    """Accumulator of D = 2/n · Σ (x − x̂) x̂ᵀ."""

    @torch.no_grad()
    def add(self, expected: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add inputs as they were and as they are, x and x̂ of the same tokens, each [..., in].

        Raises:
            StageError: x contains NaN or infinity, or is so large that products overflow.
            ValueError: there are no rows, or the widths are not `in_features`.
        """
        before, after = self._rows(expected), self._rows(inputs)
        product = (before - after).T @ after
        if not bool(torch.isfinite(product).all()):
            self._refuse(before)
        self.total += product
        self.tokens += after.shape[0]
