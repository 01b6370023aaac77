"""Attention masks that keep the conversations of a packed sequence apart.

Packed conversations are told apart by position ids that start anew. transformers derives a mask
from that for most models, but its GptOssModel (5.16) builds its two masks, full and sliding,
without the position ids: with eager or flex attention every conversation would attend to those
before it in its sequence. The model accepts prepared masks, so for eager attention they are made
here, by transformers' own functions, with the position ids. (This project's own attention goes by
the position ids itself and needs none.)
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask


def document_masks(
    config: PretrainedConfig, position_ids: torch.Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """gpt-oss's two attention masks for packed sequences.

    Args:
        config: the model's configuration, with its attention implementation.
        position_ids: int64 [batch, tokens], starting anew with each document.
        dtype: the model's, for additive masks.

    Returns:
        `full_attention` and `sliding_attention` masks, to be passed as `attention_mask`.
    """
    shape = torch.empty((), dtype=dtype, device=position_ids.device).expand(*position_ids.shape, 1)
    arguments = {
        "config": config,
        "inputs_embeds": shape,  # only its shape, dtype and device are looked at
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": position_ids,
    }
    return {
        "full_attention": create_causal_mask(**arguments),
        "sliding_attention": create_sliding_window_causal_mask(**arguments),
    }
