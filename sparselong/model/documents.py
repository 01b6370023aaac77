"""Attention masks that separate the conversations of a packed sequence.

Position ids restart at each packed conversation. transformers derives a mask from them for most
models, but its GptOssModel (5.16) builds its two masks, full and sliding, without the position ids:
with eager or flex attention every conversation would attend to the earlier ones in its sequence.
The model accepts prepared masks, so those for eager attention are built here by transformers'
functions with the position ids. This project's attention reads the position ids itself and needs no
mask.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask


def document_masks(
    config: PretrainedConfig, position_ids: torch.Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """Build gpt-oss's two attention masks for packed sequences.

    Args:
        config: the model's configuration, with its attention implementation.
        position_ids: int64 [batch, tokens], restarting with each document.
        dtype: the model's dtype, for additive masks.

    Returns:
        `full_attention` and `sliding_attention` masks, to pass as `attention_mask`.
    """
    shape = torch.empty((), dtype=dtype, device=position_ids.device).expand(*position_ids.shape, 1)
    arguments = {
        "config": config,
        "inputs_embeds": shape,  # only its shape, dtype and device are used
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": position_ids,
    }
    return {
        "full_attention": create_causal_mask(**arguments),
        "sliding_attention": create_sliding_window_causal_mask(**arguments),
    }
