"""Second moment of a projection's inputs, the only statistic that SparseGPT and GPTQ need.

For a linear layer, the squared output error of replacing W by Ŵ is tr((W−Ŵ) H (W−Ŵ)ᵀ) up to a
factor, with H = 2/n · Σ XᵀX over the n calibration tokens. llmcompressor accumulates the same
matrix with the same function but counts sequences instead of tokens. The difference is a constant
factor in H that does not affect the result (dampening is a fraction of H's mean diagonal). Counting
tokens makes H independent of how they are split into calls, apart from rounding.

Left out: any knowledge of the model. The stage decides which inputs belong to which weight; q, k
and v read the same inputs and can share one matrix.
"""

from __future__ import annotations

import torch

from sparselong.errors import StageError


class Hessian:
    """Accumulator of H = 2/n · Σ XᵀX in fp32 over the calibration data.

    Args:
        in_features: width of the inputs.
        name: name of the layer or weight, for messages.
        device: device of the matrix; inputs are moved there.
    """

    def __init__(self, in_features: int, name: str, device: torch.device | str = "cpu"):
        self.name = name
        self.matrix = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        """fp32 [in, in]."""
        self.tokens = 0
        """Number of rows added."""
        # llmcompressor reads only the module's type, which decides the layout of the inputs.
        self._linear = torch.nn.Linear(in_features, 1, bias=False, device="meta")

    @torch.no_grad()
    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs [..., in] of any float dtype; padding must already be removed.

        Raises:
            StageError: the inputs contain NaN or infinity.
            ValueError: there are no rows, or their width is not `in_features`.
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
                f"calibration inputs of {self.name} are not finite",
                "finite activations in every calibration token",
                f"NaN or infinity in {bad_rows} of {rows.shape[0]} tokens",
                "check the base model's weights, and use bf16 or fp32 (not fp16) activations",
            )
        # Imported here because it takes many seconds and rejected inputs do not need it.
        from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import accumulate_hessian

        self.matrix, self.tokens = accumulate_hessian(rows, self._linear, self.matrix, self.tokens)
