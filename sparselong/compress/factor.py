"""The factor of the inverse Hessian that every solver works with: llmcompressor's own function.

And the weight that a solver should approximate where inputs are not those of the base any more.

Two conditions that llmcompressor tolerates are errors here: a Hessian that is not positive definite
(llmcompressor warns and uses the identity) and, in `solver.py`, a Hessian that is zero.
"""

from __future__ import annotations

import torch

from sparselong.errors import StageError


def factorize(
    weight: torch.Tensor, hessian: torch.Tensor, dampening: float, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factorize the inverse of the dampened Hessian.

    Returns:
        An fp32 copy of the weight with zeros in the columns of inputs that were always zero, as in
        llmcompressor, and the upper Cholesky factor, fp32 [in, in].

    Raises:
        StageError: the dampened Hessian is not positive definite in fp32.
    """
    # Imported here because it takes many seconds and rejected weights do not need it.
    from llmcompressor.modifiers.gptq.helpers import factorize_hessian

    solved = weight.float().clone().unsqueeze(0)
    factor = hessian.clone().unsqueeze(0)
    failed = torch.zeros(1, dtype=torch.bool, device=hessian.device)
    try:
        factorize_hessian(solved, factor, dampening, failed)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        failed.fill_(True)
    if bool(failed) or not bool(torch.isfinite(factor).all()):
        eigenvalues = torch.linalg.eigvalsh(hessian.double())
        raise StageError(
            f"the Hessian of {name} could not be factorized",
            f"positive definite after dampening by {dampening:g} of its mean diagonal",
            f"eigenvalues from {eigenvalues[0]:.3g} to {eigenvalues[-1]:.3g} before dampening, "
            f"mean diagonal {hessian.diagonal().mean():.3g}",
            "use more calibration samples, or raise calibration.dampening",
        )
    return solved[0], factor[0]


def make_up(
    weight: torch.Tensor, hessian: torch.Tensor, drift: torch.Tensor, dampening: float, name: str
) -> torch.Tensor:
    """Return the weight whose output from changed inputs is closest to the weight's before.

    It minimizes Σ ‖W x − Ŵ x̂‖² over Ŵ, dampened towards W: W + W D (H + λ)⁻¹. Whatever part of the
    inputs' change is a linear function of the inputs is made up for.

    Args:
        weight: bf16 or fp32 [out, in].
        hessian: fp32 [in, in], of the changed inputs x̂.
        drift: fp32 [in, in] (`hessian.Drift`).
        dampening: λ as a fraction of the Hessian's mean diagonal.
        name: the weight's name, for messages.

    Returns:
        fp32 [out, in].

    Raises:
        StageError: the dampened Hessian is not positive definite in fp32.
    """
    _, factor = factorize(weight, hessian, dampening, name)  # (H + λ)⁻¹ = factorᵀ factor
    original = weight.float()
    return original + original @ drift @ factor.T @ factor
