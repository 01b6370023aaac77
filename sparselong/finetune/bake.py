"""The end product: the best checkpoint with its adapter in the codes, and the adapter beside it.

`03_finetune/model/` has stage 02's format: evaluation, export and chat open it the same way.
Only the dense layers are written anew; every other tensor is taken over from stage 02, hard-linked
where the file system allows. The codes are those of the last forward: both come from
`MaskedLoraLinear.codes`, on the device that trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from sparselong.finetune.lora import MaskedLoraLinear
from sparselong.model.checkpoint import Checkpoint, derive, write_tensors
from sparselong.run import write_atomically

_README = """# Adapter of {base}

LoRA matrices A and B of a fine-tuning through a 2:4 mask and int4 rounding:

    weight = round(mask * (master + alpha/r * B A))

**Added to the original dense model this adapter gives a different model**, one that was never
trained nor measured. What was trained is `../model`, which has the adapter in its codes already.
The adapter is kept to go on training from (with stage 02's masters, `masks.safetensors` beside it).
"""


def bake(compressed: Path, layers: Mapping[str, MaskedLoraLinear], target: Path) -> Checkpoint:
    """Writes the compressed checkpoint with the trained layers in place of stage 02's.

    Args:
        compressed: stage 02's `model/`.
        layers: the model's masked layers, with the state that is to be stored.
        target: directory that appears complete or not at all; replaced when it is there.
    """
    source = Checkpoint(compressed)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    by_file: dict[str, list[MaskedLoraLinear]] = {}
    for name, layer in layers.items():
        index = int(name.split(".layers.")[1].split(".")[0])
        by_file.setdefault(f"tuned-{index:05d}.safetensors", []).append(layer)
    replaced: set[str] = set()
    for file, group in by_file.items():
        tensors = {name: tensor for layer in group for name, tensor in layer.packed().items()}
        write_tensors(partial / file, tensors)
        replaced |= set(tensors)
    quantization = source.config["quantization_config"]
    derive(source, partial, replaced, [partial / file for file in by_file], quantization)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return Checkpoint(target)


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
