"""gpt-oss's experts with their weights left in MXFP4, one expert decoded at a time.

Drop-in for transformers' GptOssExperts: same call, same result on the decoded weights, trainable
through (input and routing weights get gradients, the frozen weights none). Tensors keep the
checkpoint's names, shapes and layout, so loading copies bytes and nothing else.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig

from sparselong.model.packed_linear import decoded_linear
from sparselong.packing import mxfp4


def expert_shapes(config: GptOssConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's expert tensors as the checkpoint has them, by name."""
    experts, hidden, inner = (
        config.num_local_experts,
        config.hidden_size,
        config.intermediate_size,
    )
    return {
        "gate_up_proj_blocks": (experts, 2 * inner, hidden // 32, 16),
        "gate_up_proj_scales": (experts, 2 * inner, hidden // 32),
        "gate_up_proj_bias": (experts, 2 * inner),
        "down_proj_blocks": (experts, hidden, inner // 32, 16),
        "down_proj_scales": (experts, hidden, inner // 32),
        "down_proj_bias": (experts, hidden),
    }


class PackedExperts(nn.Module):
    """The experts of one layer; see the module's text."""

    def __init__(self, config: GptOssConfig):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.alpha, self.limit = 1.702, 7.0
        for name, shape in expert_shapes(config).items():
            if name.endswith("_bias"):
                parameter = nn.Parameter(torch.empty(shape), requires_grad=False)
                self.register_parameter(name, parameter)
            else:
                self.register_buffer(name, torch.empty(shape, dtype=torch.uint8))

    def _project(self, x: torch.Tensor, projection: str, expert: int) -> torch.Tensor:
        blocks = getattr(self, f"{projection}_blocks")[expert]
        scales = getattr(self, f"{projection}_scales")[expert]
        bias = getattr(self, f"{projection}_bias")[expert]
        return decoded_linear(x, lambda dtype: mxfp4.decode(blocks, scales, dtype), bias)

    def _gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Clamped SwiGLU over interleaved columns: (up + 1) · gate · σ(α · gate)."""
        gate = gate_up[..., ::2].clamp(max=self.limit)
        up = gate_up[..., 1::2].clamp(min=-self.limit, max=self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_indices: torch.Tensor,
        routing_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: [tokens, hidden].
            router_indices: int64 [tokens, top_k], the experts of each token.
            routing_weights: [tokens, top_k].

        Returns:
            [tokens, hidden].
        """
        result = torch.zeros_like(hidden_states)
        for expert in torch.unique(router_indices).tolist():
            token, choice = torch.where(router_indices == expert)
            gate_up = self._project(hidden_states[token], "gate_up_proj", expert)
            output = self._project(self._gate(gate_up), "down_proj", expert)
            weighted = output * routing_weights[token, choice, None]
            result = result.index_add(0, token, weighted.to(result.dtype))
        return result
