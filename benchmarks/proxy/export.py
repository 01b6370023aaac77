"""The trained network as a checkpoint in gpt-oss's published layout, in small files.

Experts are MXFP4, everything else bf16. Beside the tensors there are config.json and
generation_config.json; the tokenizer's files are those of `prepare.py` and are copied to them,
unless the checkpoint is to have as few files as possible to be brought from another machine.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.proxy.network import Network
from sparselong.checkpoint import PUBLISHED_QUANTIZATION
from sparselong.files import write_atomically
from sparselong.packing import mxfp4

_SHARD_BYTES = 15 << 20


def write_checkpoint(network: Network, folder: Path, tokenizer: Path | None = None) -> None:
    """Write a network's checkpoint; an earlier one in the folder is replaced.

    Args:
        network: the trained one.
        folder: made if it does not exist.
        tokenizer: a folder whose files are copied.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _plan_shards(pack_tensors(network))
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    size = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)
    config = network.config
    document = config.to_dict() | {
        "architectures": ["GptOssForCausalLM"],
        "dtype": "bfloat16",
        "quantization_config": PUBLISHED_QUANTIZATION,
    }
    _write_json(folder / "config.json", dict(sorted(document.items())))
    generation = {
        "bos_token_id": config.bos_token_id,
        "do_sample": True,
        "eos_token_id": [config.eos_token_id, config.pad_token_id],
        "pad_token_id": config.pad_token_id,
    }
    _write_json(folder / "generation_config.json", generation)
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


def pack_tensors(network: Network) -> dict[str, torch.Tensor]:
    """Return the stored tensors by their published names, on the CPU."""
    packed = {}
    for name, value in network.named_parameters():
        rounded = value.detach().bfloat16()
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = mxfp4.encode(rounded)
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks.cpu(), scales.cpu()
        else:
            packed[name] = rounded.cpu()
    return packed


def _plan_shards(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > _SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    return shards


def _write_json(path: Path, document: dict) -> None:
    write_atomically(path, json.dumps(document, indent=2) + "\n")
