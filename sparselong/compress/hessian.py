"""The second moment of a projection's inputs: all that SparseGPT and GPTQ ask of the data.

For a linear layer the squared output error of replacing W by Ŵ is tr((W−Ŵ) H (W−Ŵ)ᵀ) up to a
factor, with H = 2/n · Σ XᵀX over the n calibration tokens. llmcompressor accumulates the same
matrix with the same function; it counts sequences where tokens are counted here, which changes H by
a constant that nothing downstream sees (dampening is a fraction of H's mean diagonal), and makes
the result independent of how the tokens were split into calls, rounding apart.

Left out: any knowledge of the model. Which inputs belong to which weight is the stage's business;
q, k and v read the same inputs and can share one matrix.
"""

from __future__ import annotations

import torch

from sparselong.errors import StageError


class Hessian:
    """Accumulates H = 2/n · Σ XᵀX in fp32 while the calibration data flows by.

    Args:
        in_features: width of the inputs.
        name: what the inputs belong to, for messages.
        device: where the matrix lives; inputs are brought there.
    """

    def __init__(self, in_features: int, name: str, device: torch.device | str = "cpu"):
        self.name = name
        self.matrix = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        """fp32 [in, in]."""
        self.tokens = 0
        """How many rows have been added."""
        # llmcompressor chooses the arrangement of the inputs by the module's type and reads nothing
        # else of it.
        self._linear = torch.nn.Linear(in_features, 1, bias=False, device="meta")

    @torch.no_grad()
    def add(self, inputs: torch.Tensor) -> None:
        """Adds the inputs [..., in] of any float dtype; padding must have been removed.

        Raises:
            StageError: NaN or infinity among the inputs.
            ValueError: no rows, or rows of another width.
        """
        in_features = self.matrix.shape[0]
        if inputs.shape[-1] != in_features or inputs.numel() == 0:
            raise ValueError(
                f"{self.name}: inputs [..., {in_features}] expected, got {tuple(inputs.shape)}"
            )
        rows = inputs.detach().reshape(-1, 1, in_features)
        bad_rows = int((~torch.isfinite(rows)).any(dim=-1).sum())
        if bad_rows:
            raise StageError(
                f"calibration of {self.name} met inputs that are not finite",
                "finite activations in every calibration token",
                f"NaN or infinity in {bad_rows} of {rows.shape[0]} tokens",
                "check the base model's weights, and use bf16 or fp32 (not fp16) activations",
            )
        # Imported here: it takes many seconds, and refused input needs none of it.
        from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import accumulate_hessian

        self.matrix, self.tokens = accumulate_hessian(rows, self._linear, self.matrix, self.tokens)
