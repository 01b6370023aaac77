"""The factor of the inverse Hessian that every solver works with.

    dampened H  →  lower Cholesky factor  →  inverse  →  upper Cholesky factor

as in GPTQ (Frantar et al., 2022). An input that was zero in every calibration token, a dead
channel, has a row of zeros in H; it gets the mean of the others on the diagonal, so that dampening,
a fraction of the mean diagonal, is that of the inputs that are alive, whatever their scale.

And the weight that a solver should approximate where inputs are not those of the base any more.

Two conditions that llmcompressor tolerates are errors here: a Hessian that is not positive definite
(llmcompressor warns and uses the identity), and one that is zero.
"""

from __future__ import annotations

import torch

from sparselong.errors import StageError


def factorize(
    weight: torch.Tensor, hessian: torch.Tensor, dampening: float, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factorize the inverse of the dampened Hessian.

    Args:
        weight: [out, in].
        hessian: fp32 [in, in]; not changed.
        dampening: added to the diagonal, as a fraction of its mean over inputs that are not dead.
        name: the weight's name, for messages.

    Returns:
        An fp32 copy of the weight with zeros in the columns of dead inputs, as in llmcompressor,
        and the upper Cholesky factor, fp32 [in, in].

    Raises:
        StageError: the Hessian contains NaN or infinity, is zero, or is not positive definite in
            fp32 after dampening.
    """
    if not bool(torch.isfinite(hessian).all()) or not bool(hessian.diagonal().any()):
        raise StageError(
            f"the Hessian of {name} is unusable",
            "a finite Hessian with a nonzero diagonal",
            "NaN or infinity in it" if bool(hessian.diagonal().any()) else "a diagonal of zeros",
            "check data.train and the base model, and use more calibration samples",
        )
    solved, dampened = weight.float().clone(), hessian.clone()
    diagonal = dampened.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum()
    solved.masked_fill_(dead, 0.0)
    diagonal.copy_(torch.where(dead, mean, diagonal) + dampening * mean)
    lower, failed = torch.linalg.cholesky_ex(dampened)
    if not bool(failed):
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not bool(failed) and bool(torch.isfinite(factor).all()):
            return solved, factor.contiguous()
    eigenvalues = torch.linalg.eigvalsh(hessian.double())
    raise StageError(
        f"the Hessian of {name} could not be factorized",
        f"positive definite after dampening by {dampening:g} of its mean diagonal",
        f"eigenvalues from {eigenvalues[0]:.3g} to {eigenvalues[-1]:.3g} before dampening, "
        f"mean diagonal {mean:.3g}",
        "use more calibration samples, or raise calibration.dampening",
    )


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
        StageError: see `factorize`.
    """
    _, factor = factorize(weight, hessian, dampening, name)  # (H + λ)⁻¹ = factorᵀ factor
    original = weight.float()
    return original + original @ drift @ factor.T @ factor
