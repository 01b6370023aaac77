"""The experts' pass in plain torch: what the kernels and the CPU's backend are checked against.

The definition, and nothing else: every choice of every token by itself, its expert's weight read
from a table of sixteen values. Gradients are torch's own. It shares no code with the backends.
"""

from __future__ import annotations

import torch

CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decode_reference(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """uint8 blocks [..., G, 16] and scales [..., G] → fp64 [..., 32 G], low nibble first."""
    table = torch.tensor(CODES + tuple(-c for c in CODES), dtype=torch.float64)
    table = table.to(blocks.device)
    values = torch.stack((table[(blocks % 16).long()], table[(blocks // 16).long()]), -1)
    return (values.flatten(-2) * torch.exp2(scales.double() - 127).unsqueeze(-1)).flatten(-2)


def expert_mlp_reference(
    x: torch.Tensor,
    expert_indices: torch.Tensor,
    routing_weights: torch.Tensor,
    gate_up: tuple[torch.Tensor, torch.Tensor],
    gate_up_bias: torch.Tensor,
    down: tuple[torch.Tensor, torch.Tensor],
    down_bias: torch.Tensor,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    """[tokens, hidden] fp64. `gate_up`, `down`: (blocks, scales); shapes as in `expert_mlp`."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for expert in range(gate_up_bias.shape[0]):
        weight = ((expert_indices == expert) * routing_weights.double()).sum(1)
        wide = x.double() @ decode_reference(gate_up[0][expert], gate_up[1][expert]).T
        wide = wide + gate_up_bias[expert].double()
        gate = torch.minimum(wide[:, 0::2], torch.tensor(limit).to(wide))
        up = torch.clamp(wide[:, 1::2], -limit, limit)
        h = (up + 1) * gate / (1 + torch.exp(-alpha * gate))
        y = h @ decode_reference(down[0][expert], down[1][expert]).T + down_bias[expert].double()
        out = out + y * weight[:, None]
    return out
