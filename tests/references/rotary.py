"""Rotary embedding by definition, in fp64: pairs as complex numbers, rotated by an angle.

autograd computes the gradients. Shares no code with the package.
"""

from __future__ import annotations

import torch


def rotate_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys [batch, heads, tokens, head_dim] in fp64.

    Element i of the first half and element i of the second half form a complex number, which is
    multiplied by cos + i sin, [batch or 1, tokens, head_dim / 2].
    """
    turn = torch.complex(cos.double(), sin.double())

    def rotate(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        number = torch.complex(x[..., :half].double(), x[..., half:].double())
        turned = number * turn.unsqueeze(1)
        return torch.cat((turned.real, turned.imag), -1)

    return rotate(q), rotate(k)
