"""The proxy's architecture: gpt-oss with smaller sizes."""

from __future__ import annotations

from typing import Any

from transformers import GptOssConfig

POSITIONS = 4096
VOCABULARY = 8192
_TRAINED_ROTARY, _FACTOR = 1024, 4.0
"""YaRN's form with its factor small: gpt-oss's are 4,096 and 32."""


def describe(marks: list[int], **sizes: int) -> GptOssConfig:
    """Return the model's configuration.

    Args:
        marks: ids of the tokens that begin a text, end a turn, and end a text.
        **sizes: other sizes than the proxy's, for tests.
    """
    first, end, padding = marks
    chosen: dict[str, Any] = {
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "intermediate_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        **sizes,
    }
    return GptOssConfig(
        **chosen,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": _FACTOR,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": _TRAINED_ROTARY,
        },
        bos_token_id=first,
        eos_token_id=end,
        pad_token_id=padding,
    )


MINIATURE = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
"""Sizes of a network that takes a step in a second on a CPU."""
