"""Writing a GptOssForCausalLM to disk in the format of the published openai/gpt-oss.

Experts are stored as MXFP4 with out-features outermost (`*_blocks`, `*_scales`), everything else as
bf16 under upstream's names, in several safetensors shards with an index. Embeddings and the dense
part of all layers but the last share a shard, each expert shard holds two layers, and the last
layer is one mixed shard. A reader thus meets both cases of the published checkpoints: shards that
compression leaves untouched, and shards that it changes in part.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GptOssForCausalLM

from sparselong.checkpoint import PUBLISHED_QUANTIZATION
from sparselong.packing import mxfp4

_LAYERS_PER_EXPERT_SHARD = 2


def write_weights(model: GptOssForCausalLM, folder: Path) -> None:
    """Round the model's weights to bf16 and MXFP4 and write the shards and their index."""
    shards = _plan_shards(_pack_tensors(model))
    weight_map, total_size_bytes = {}, 0
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total_size_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {
        "metadata": {"total_size": total_size_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    _write_json(folder / "model.safetensors.index.json", index)


def write_configs(model: GptOssForCausalLM, folder: Path) -> None:
    """Write config.json and generation_config.json with upstream's keys."""
    config = model.config.to_dict()
    config.update(
        architectures=["GptOssForCausalLM"],
        dtype="bfloat16",
        quantization_config=PUBLISHED_QUANTIZATION,
    )
    _write_json(folder / "config.json", dict(sorted(config.items())))
    generation = {
        "bos_token_id": model.config.bos_token_id,
        "do_sample": True,
        "eos_token_id": [model.config.eos_token_id, model.config.pad_token_id],
        "pad_token_id": model.config.pad_token_id,
    }
    _write_json(folder / "generation_config.json", generation)


def _pack_tensors(model: GptOssForCausalLM) -> dict[str, torch.Tensor]:
    """Return name → stored tensor; experts [E, in, out] in memory become [E, out, in]."""
    packed = {}
    for name, value in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            rounded = value.bfloat16().transpose(1, 2).contiguous()
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = mxfp4.encode(rounded)
        else:
            packed[name] = value.bfloat16().contiguous()
    return packed


def _plan_shards(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    last = max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    shards: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        if layer == last:
            position = last + 1
        elif layer is not None and ".experts." in name:
            position = 1 + layer // _LAYERS_PER_EXPERT_SHARD
        else:
            position = 0
        shards.setdefault(position, {})[name] = tensor
    return [shards[position] for position in sorted(shards)]


def _write_json(path: Path, document: dict) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
