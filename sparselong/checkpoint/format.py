"""The published form's projections, quantization and expert shapes, and 2:4 packing of experts."""

from __future__ import annotations

import torch
from transformers import GptOssConfig

from sparselong.packing import mxfp4, two_four

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The shared dense layers: the attention projections."""
PUBLISHED_QUANTIZATION = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
"""`quantization_config` in config.json of the published checkpoints."""


def expert_shapes(config: GptOssConfig) -> dict[str, tuple[int, ...]]:
    """Return the stored shapes of one layer's expert tensors by name."""
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


def pack_two_four_experts(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop the two smallest of every four MXFP4 codes; the kept codes are unchanged.

    Args:
        blocks: uint8 [..., K/32, 16].

    Returns:
        Kept codes uint8 [..., K/32, 8] and packed patterns uint8 [..., K/32, 3]. Of equal
        magnitudes the earlier is kept. Codes are comparable because a block shares its scale.
    """
    codes = mxfp4.unpack_codes(blocks)
    groups = (codes & 0x7).reshape(*codes.shape[:-1], -1, two_four.GROUP)
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., :2]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
    mask = mask.reshape(codes.shape)
    kept = two_four.gather_kept(codes, mask)
    pairs = kept.reshape(*blocks.shape[:-1], 8, 2)
    patterns = two_four.pack_mask(mask).reshape(*blocks.shape[:-1], 3)
    return pairs[..., 0] | (pairs[..., 1] << 4), patterns


def unpack_two_four_experts(kept: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
    """Restore uint8 blocks [..., K/32, 16] from kept codes and patterns; dropped codes are 0."""
    codes = torch.stack((kept & 0x0F, kept >> 4), dim=-1).flatten(-2)
    mask = two_four.unpack_mask(patterns)
    return mxfp4.pack_codes(two_four.scatter_kept(codes, mask)).squeeze(-2)
