"""The end product: the best checkpoint with its adapter in the codes, and the adapter beside it.

`03_finetune/model/` has stage 02's format: evaluation, export and chat open it the same way.
Only the dense layers are written anew; every other tensor is taken over from stage 02, hard-linked
where the file system allows. The codes are those of the last forward: both come from
`MaskedLoraLinear.codes`, on the device that trained. So is a router's weight, where it has an
adapter. Experts with adapters are the exception: their sum is rounded to MXFP4 here, and `Baked`
says what that lost.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sparselong.adapters.attach import TunedLayer
from sparselong.adapters.expert_lora import ExpertLora
from sparselong.checkpoint import Checkpoint, derive, write_tensors
from sparselong.files import write_atomically

_README = """# Adapter of {base}

LoRA matrices A and B of a fine-tuning through a 2:4 mask and int4 rounding:

    weight = round(mask * (master + alpha/r * B A))

**Added to the original dense model this adapter gives a different model**, one that was never
trained nor measured. What was trained is `../model`, which has the adapter in its codes already.
The adapter is kept to go on training from (with stage 02's masters, `masks.safetensors` beside it).
Adapters of experts and routers, where there are any, are plain LoRA in PEFT's own layout; the
experts of `../model` are their sum rounded to MXFP4, and the stage's manifest says what that lost.
"""


class Baked(NamedTuple):
    """What was written."""

    checkpoint: Checkpoint
    expert_rounding: dict[str, dict[str, dict[str, float]]]
    """What rounding lost, by experts and weight (`expert_merge.Rounding.summarize`)."""


def bake_checkpoint(compressed: Path, layers: Mapping[str, TunedLayer], target: Path) -> Baked:
    """Writes the compressed checkpoint with the trained layers in place of stage 02's.

    Args:
        compressed: stage 02's `model/`.
        layers: the model's layers with adapters, with the state that is to be stored.
        target: directory that appears complete or not at all; replaced when it is there.
    """
    source = Checkpoint(compressed)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    by_file: dict[str, list[TunedLayer]] = {}
    for name, layer in layers.items():
        index = int(name.split(".layers.")[1].split(".")[0])
        by_file.setdefault(f"tuned-{index:05d}.safetensors", []).append(layer)
    replaced: set[str] = set()
    rounding: dict[str, dict[str, dict[str, float]]] = {}
    for file, group in by_file.items():
        tensors = {}
        for layer in group:
            if isinstance(layer, ExpertLora):
                merged, lost = layer.merge_packed()
                rounding[layer.name] = {weight: one.summarize() for weight, one in lost.items()}
                tensors |= merged
            else:
                tensors |= layer.packed()
        write_tensors(partial / file, tensors)
        replaced |= set(tensors)
    quantization = source.config["quantization_config"]
    derive(source, partial, replaced, [partial / file for file in by_file], quantization)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return Baked(Checkpoint(target), rounding)


def put_baked_experts(baked: Checkpoint, layers: Mapping[str, TunedLayer]) -> None:
    """Lets a trained model compute with its baked experts and without their adapters.

    Its losses are those of the baked model from then on.
    """
    for layer in layers.values():
        if not isinstance(layer, ExpertLora):
            continue
        names = [n for w in layer.adapters() for n in (f"{w}_blocks", f"{w}_scales")]
        stored = baked.read(f"{layer.name}.{name}" for name in names)
        for name in names:
            getattr(layer.packed_experts, name).copy_(stored[f"{layer.name}.{name}"])
        layer.enable_adapters(False)


def name_adapter(directory: Path, base: str) -> None:
    """Names what the saved adapter belongs to, in its config and a README that says what it is not.

    PEFT has written the path on this machine, which means nothing elsewhere.

    Args:
        directory: where PEFT has saved the adapter.
        base: stage 02's name of the checkpoint.
    """
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    write_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    (directory / "README.md").write_text(_README.format(base=base), encoding="utf-8")
