"""Experts with adapters by their definition, in fp64: each expert's dense sum W + s B A is made.

What the kernels and the CPU's backend are checked against; gradients are torch's own. Shares no
code with them.
"""

from __future__ import annotations

import torch

from tests.references.expert_mlp import decode_reference


def expert_lora_reference(
    x: torch.Tensor,
    expert_indices: torch.Tensor,
    routing_weights: torch.Tensor,
    gate_up: tuple[torch.Tensor, ...],
    down: tuple[torch.Tensor, ...],
    gate_up_adapter: tuple[torch.Tensor, torch.Tensor, float] | None,
    down_adapter: tuple[torch.Tensor, torch.Tensor, float] | None,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    """[tokens, hidden] fp64. `gate_up`, `down`: (blocks, scales, bias); adapters: (A, B, s)."""

    def weight(stack, adapter, expert):
        dense = decode_reference(stack[0][expert], stack[1][expert])
        if adapter is not None:
            a, b, scaling = adapter
            dense = dense + scaling * b[expert].double() @ a[expert].double()
        return dense

    out = torch.zeros_like(x, dtype=torch.float64)
    for expert in range(gate_up[2].shape[0]):
        share = ((expert_indices == expert) * routing_weights.double()).sum(1)
        wide = x.double() @ weight(gate_up, gate_up_adapter, expert).T + gate_up[2][expert].double()
        gate = torch.minimum(wide[:, 0::2], torch.tensor(limit).to(wide))
        up = torch.clamp(wide[:, 1::2], -limit, limit)
        h = (up + 1) * gate / (1 + torch.exp(-alpha * gate))
        y = h @ weight(down, down_adapter, expert).T + down[2][expert].double()
        out = out + y * share[:, None]
    return out
