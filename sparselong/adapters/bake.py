"""Write stage 03's result: the best checkpoint with its adapter baked in, and the adapter itself.

`03_finetune/model/` has stage 02's format, so evaluation, export and chat open it the same way.
Only the dense layers are rewritten; every other tensor comes from stage 02, hard-linked if the file
system allows. The codes equal those of the last forward pass: both come from
`MaskedLoraLinear.codes` on the training device. The same holds for the weight of a router with an
adapter. Experts with adapters are the exception: their sum is rounded to MXFP4 here, and `Baked`
reports the rounding loss. If several processes share them, each rounds those that it holds, a layer
at a time, and writes them to their place in the layer's file; they are never gathered.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from sparselong.adapters.attach import TunedLayer
from sparselong.adapters.expert_lora import ExpertLora
from sparselong.adapters.merge import Rounding
from sparselong.checkpoint import Checkpoint, begin_file, derive, read_header, write_rows
from sparselong.files import load_json, write_atomically
from sparselong.processes import world as ranks

_Roundings = dict[str, dict[str, Rounding]]
"""Rounding by experts module and weight."""

_README = """# Adapter of {base}

LoRA matrices A and B, fine-tuned through a 2:4 mask and int4 rounding:

    weight = round(mask * (master + alpha/r * B A))

**Added to the original dense model, this adapter gives a different model** that was never trained
or measured. The trained model is `../model`, whose codes already include the adapter. Keep the
adapter to continue training, together with stage 02's masters and `masks.safetensors`. Adapters of
experts and routers, if any, are plain LoRA in PEFT's layout. The experts of `../model` are their
sum rounded to MXFP4; the stage's manifest reports the rounding loss.
"""


class Baked(NamedTuple):
    """Result of `bake_checkpoint`."""

    checkpoint: Checkpoint
    expert_rounding: dict[str, dict[str, dict[str, float]]]
    """Rounding loss by experts module and weight (`merge.Rounding.summarize`)."""


def bake_checkpoint(compressed: Path, layers: Mapping[str, TunedLayer], target: Path) -> Baked:
    """Write the compressed checkpoint with the trained layers in place of stage 02's; collective.

    Args:
        compressed: stage 02's `model/`.
        layers: the model's layers with adapters, in the state to store.
        target: directory, created atomically; an existing one is replaced.
    """
    partial = target.with_name(target.name + ".partial")
    files: dict[Path, list[TunedLayer]] = {}
    for name, layer in layers.items():
        index = int(name.split(".layers.")[1].split(".")[0])
        files.setdefault(partial / f"tuned-{index:05d}.safetensors", []).append(layer)
    if ranks.is_first():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path, group in files.items():
            _begin(path, group)
    ranks.wait_for_all()
    parts = ranks.collect(_write_experts(files) if ranks.holds_first_replica() else {})
    if ranks.is_first():
        source = Checkpoint(compressed)
        replaced = {name for path in files for name in read_header(path)}
        derive(source, partial, replaced, files, source.config["quantization_config"])
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    ranks.wait_for_all()
    return Baked(Checkpoint(target), _summarize(parts))


def _begin(path: Path, group: Iterable[TunedLayer]) -> None:
    """Write a layer's file, in which only the data of its experts is missing."""
    tensors: dict[str, torch.Tensor] = {}
    for layer in group:
        tensors |= layer.merged_shapes() if isinstance(layer, ExpertLora) else layer.packed()
    begin_file(path, tensors)


def _write_experts(files: Mapping[Path, list[TunedLayer]]) -> _Roundings:
    """Merge and write this process's experts; return their rounding by module and weight."""
    rounding: _Roundings = {}
    for path, group in files.items():
        for layer in group:
            if isinstance(layer, ExpertLora):
                tensors, rounding[layer.name] = layer.merge_packed()
                for name, tensor in tensors.items():
                    write_rows(path, name, tensor, layer.packed_experts.held.start)
    return rounding


def _summarize(parts: Iterable[_Roundings]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the rounding loss of all processes' experts."""
    total: _Roundings = {}
    for part in parts:
        for name, weights in part.items():
            sums = total.setdefault(name, {})
            for weight, one in weights.items():
                sums[weight] = sums.get(weight, Rounding()) + one
    return {name: {w: one.summarize() for w, one in sums.items()} for name, sums in total.items()}


def put_baked_experts(baked: Checkpoint, layers: Mapping[str, TunedLayer]) -> None:
    """Load a trained model's baked experts, those that it holds, and disable their adapters.

    From then on its losses are those of the baked model.
    """
    for layer in layers.values():
        if not isinstance(layer, ExpertLora):
            continue
        experts = layer.packed_experts
        for name in (n for w in layer.adapters() for n in (f"{w}_blocks", f"{w}_scales")):
            stored = [*baked.read_slices(f"{layer.name}.{name}", experts.held)]
            getattr(experts, name).copy_(torch.cat(stored))
        layer.enable_adapters(False)


def name_adapter(directory: Path, base: str) -> None:
    """Write the base checkpoint's name to the saved adapter's config and a README on its use.

    PEFT writes a local path, which is meaningless on other machines.

    Args:
        directory: directory to which PEFT saved the adapter.
        base: stage 02's name for the checkpoint.
    """
    path = directory / "adapter_config.json"
    config = load_json(path)
    config["base_model_name_or_path"] = base
    write_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    (directory / "README.md").write_text(_README.format(base=base), encoding="utf-8")
