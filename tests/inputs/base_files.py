"""Keys of the small base's config.json, and a function that changes them."""

import json
from pathlib import Path

ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
GONE = object()
TYPES = ["sliding_attention", "full_attention"] * 2
SIZES = (
    *("num_hidden_layers", "num_local_experts", "hidden_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "num_experts_per_tok"),
    *("vocab_size", "sliding_window"),
)


def change_config(base: Path, **changes) -> Path:
    """Change keys of a base's config.json; GONE removes one. Return the file's path."""
    path = base / "config.json"
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not GONE}))
    return path
