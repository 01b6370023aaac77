"""Reference for the experts in plain torch, against which all backends are tested.

It follows the definition: every expert runs on all tokens, with weights decoded through a table of
sixteen values. autograd computes the gradients. It shares no code with the backends.
"""

from __future__ import annotations

import torch

CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decode_reference(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Decode blocks [..., G, 16] and scales [..., G] to fp64 [..., 32 G], low nibble first."""
    table = torch.tensor(CODES + tuple(-c for c in CODES), dtype=torch.float64)
    table = table.to(blocks.device)
    values = torch.stack((table[(blocks % 16).long()], table[(blocks // 16).long()]), -1)
    return (values.flatten(-2) * torch.exp2(scales.double() - 127).unsqueeze(-1)).flatten(-2)


def expert_mlp_reference(
    x: torch.Tensor,
    expert_indices: torch.Tensor,
    routing_weights: torch.Tensor,
    stack: tuple[tuple[torch.Tensor, ...], ...],
    adapters: tuple[tuple | None, tuple | None] = (None, None),
    gate: tuple[float, float] = (1.702, 7.0),
) -> torch.Tensor:
    """Return the weighted sum of the selected experts' outputs, fp64 [tokens, hidden].

    Args:
        x: as in `expert_mlp`.
        expert_indices: as in `expert_mlp`.
        routing_weights: as in `expert_mlp`.
        stack: (blocks, scales, bias) of gate_up and of down.
        adapters: (A, B, s) of gate_up and of down, or None; forms W + s B A of each expert.
        gate: alpha and limit.
    """

    def multiply(rows, name, expert):
        blocks, scales, bias = stack[name]
        weight = decode_reference(blocks[expert], scales[expert])
        if adapters[name] is not None:
            a, b, scaling = adapters[name]
            weight = weight + scaling * b[expert].double() @ a[expert].double()
        return rows @ weight.T + bias[expert].double()

    alpha, limit = gate
    out = torch.zeros_like(x, dtype=torch.float64)
    for expert in range(stack[0][0].shape[0]):
        share = ((expert_indices == expert) * routing_weights.double()).sum(1)
        wide = multiply(x.double(), 0, expert)
        linear = torch.minimum(wide[:, 0::2], torch.tensor(limit).to(wide))
        up = torch.clamp(wide[:, 1::2], -limit, limit)
        h = (up + 1) * linear / (1 + torch.exp(-alpha * linear))
        out = out + multiply(h, 1, expert) * share[:, None]
    return out
