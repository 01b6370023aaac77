"""A base checkpoint in the published form with random weights, for the numbered scripts.

The tensors, their names and dtypes are those of openai/gpt-oss; a few layers are as good as all of
them for a test of the scripts. Values are made on the GPU if there is one, and written file by
file, so that neither host nor GPU holds more than two layers. Their magnitudes are those of a
trained model: every layer adds a small part to the residual stream, and routers are decided.
Otherwise rounding would change the choice of experts, and with it everything that follows, and no
two computations of one likelihood would agree. The tokenizer and the chat template are the small
model's; there are more rows in the embeddings than it has tokens.
"""

from __future__ import annotations

import json
import math
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GptOssConfig

from sparselong.checkpoint.architecture import Shapes, layer_tensors, model_tensors
from sparselong.checkpoint.format import PUBLISHED_QUANTIZATION
from sparselong.data import corpus
from sparselong.tiny.tokenizer import train_tokenizer

_TRUE = {
    **{"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 128},
    **{"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 201_088},
    "sliding_window": 128,
}
WIDTHS = {
    "true": _TRUE,
    "20b": {**_TRUE, "num_local_experts": 32},
    "tiny": {
        **{"hidden_size": 128, "intermediate_size": 128, "num_local_experts": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096},
        "sliding_window": 64,
    },
}
"""Sizes of openai/gpt-oss-120b and -20b, and small ones for a machine without a GPU."""
TOKENS = 2048
"""Entries of the tokenizer; the embeddings may have more rows."""
LAYERS_PER_SHARD = 2
_CODE_RMS = 2.93
"""Root mean square of uniformly random E2M1 codes."""
_EMBEDDING_STD = 0.5
_ROUTER_GAIN = 3.0
_DTYPES = {"BF16": torch.bfloat16, "U8": torch.uint8}


def write_base(
    folder: Path, widths: str, layers: int, device: str, progress: Callable[[str], None]
) -> None:
    """Write a checkpoint with random weights; the same arguments give the same bytes.

    Args:
        folder: a directory that does not exist yet.
        widths: a name in WIDTHS.
        layers: decoder layers.
        device: where values are made.
        progress: called with a line of text for every file.
    """
    document = write_description(folder, widths, layers)
    document.pop("quantization_config")
    shards = _plan_shards(GptOssConfig(**document))
    generator = torch.Generator(device).manual_seed(0)
    weight_map, total_bytes = {}, 0
    for number, shapes in enumerate(shards):
        name = f"model-{number:05d}-of-{len(shards) - 1:05d}.safetensors"
        tensors = {key: _make(key, *shapes[key], layers, generator).cpu() for key in shapes}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        progress(f"{name}: {total_bytes / 1e9:.1f} GB written")
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    _write_json(folder / "model.safetensors.index.json", index)


def write_description(folder: Path, widths: str, layers: int) -> dict[str, Any]:
    """Write what a checkpoint has beside tensors; return its config.json.

    Args:
        folder: see `write_base`.
        widths: see `write_base`.
        layers: see `write_base`.
    """
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer(corpus.texts("train"), TOKENS, 131_072)
    tokenizer.save_pretrained(folder)
    document: dict[str, Any] = _describe(widths, layers) | {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    _write_json(folder / "config.json", document)
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "do_sample": True,
        "eos_token_id": [tokenizer.eos_token_id, tokenizer.pad_token_id],
        "pad_token_id": tokenizer.pad_token_id,
    }
    _write_json(folder / "generation_config.json", generation)
    return document


def enlarge_vocabulary(folder: Path, size: int) -> None:
    """Add random tokens to a tokenizer, each with the merge that makes it from two others."""
    path, chosen = folder / "tokenizer.json", random.Random(0)
    document = json.loads(path.read_text(encoding="utf-8"))
    vocabulary, merges = document["model"]["vocab"], document["model"]["merges"]
    parts = list(vocabulary)
    letters = [letter for letter in string.ascii_letters if letter in vocabulary]
    # Special tokens keep their ids only if the vocabulary has no gap where they are.
    vocabulary |= {one["content"]: one["id"] for one in document["added_tokens"]}
    number = 1 + max(vocabulary.values())
    while len(vocabulary) < size:
        left, right = chosen.choice(parts), chosen.choice(letters)
        if left + right not in vocabulary:
            vocabulary[left + right] = number
            merges.append([left, right])
            parts.append(left + right)
            number += 1
    path.write_text(json.dumps(document), encoding="utf-8")


def _describe(widths: str, layers: int) -> dict[str, Any]:
    """Return openai/gpt-oss-120b's published config.json with other sizes, without token ids."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "layer_types": [
            ("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)
        ],
        "max_position_embeddings": 131_072,
        "model_type": "gpt_oss",
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "output_router_logits": False,
        "quantization_config": PUBLISHED_QUANTIZATION,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150_000,
        "router_aux_loss_coef": 0.9,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        **WIDTHS[widths],
    }


def _plan_shards(config: GptOssConfig) -> list[Shapes]:
    """Return the tensors of every file: whole layers, and embeddings and lm_head in the first."""
    count = config.num_hidden_layers
    layers = [layer_tensors(config, layer) for layer in range(count)]
    rest = {
        name: found
        for name, found in model_tensors(config).items()
        if not name.startswith("model.layers.")
    }
    shards = [rest]
    for first in range(0, count, LAYERS_PER_SHARD):
        shard: Shapes = {}
        for tensors in layers[first : first + LAYERS_PER_SHARD]:
            shard |= tensors
        shards.append(shard)
    return shards


def _make(
    name: str, dtype: str, shape: tuple[int, ...], layers: int, generator: torch.Generator
) -> torch.Tensor:
    """Return random values of a tensor, on the generator's device."""
    tensor = torch.empty(shape, dtype=_DTYPES[dtype], device=generator.device)
    gain = (2 * layers) ** -0.5 if "down_proj" in name or "o_proj" in name else 1.0
    if name.endswith("_blocks"):
        return tensor.random_(0, 256, generator=generator)
    if name.endswith("_scales"):
        inputs = shape[-1] * 32
        exponent = 127 + round(math.log2(gain * inputs**-0.5 / _CODE_RMS))
        return tensor.random_(exponent - 1, exponent + 2, generator=generator)
    if "norm" in name:
        return tensor.fill_(1.0)
    if name.endswith("sinks"):
        std = 1.0
    elif name.endswith("bias"):
        std = 0.02
    elif "embed_tokens" in name:
        std = _EMBEDDING_STD
    else:
        std = shape[-1] ** -0.5 * (_ROUTER_GAIN if "router" in name else gain)
    return tensor.normal_(0.0, std, generator=generator)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
