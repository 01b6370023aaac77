"""Masked LoRA put into a whole model, through PEFT's registry of custom modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, set_seed

from sparselong.errors import StageError
from sparselong.finetune.lora import MaskedLoraLinear, masked_layers
from sparselong.model.packed_linear import PackedLinear


class Masters:
    """Stage 02's dense masters, read one at a time.

    Args:
        directory: `02_compress/masters`, a safetensors file per layer.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.files: dict[str, Path] = {}
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self.files |= dict.fromkeys(file.keys(), path)

    def read(self, module: str) -> torch.Tensor:
        """The master of a module by its name, bf16 [out, in].

        Raises:
            StageError: stage 02 left none.
        """
        name = f"{module}.weight"
        if name not in self.files:
            raise StageError(
                f"stage 02 left no master of {module}",
                f"{name} in {self.directory}",
                f"masters of {len(self.files)} other layers",
                "redo it: python 02_compress.py --force",
            )
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)


def add_masked_lora(
    model: PreTrainedModel,
    *,
    targets: Sequence[str],
    r: int,
    alpha: float,
    master_of: Callable[[str], torch.Tensor],
    seed: int,
) -> tuple[PeftModel, LoraConfig]:
    """Replaces the target layers by MaskedLoraLinear and freezes everything else.

    Args:
        model: as stage 02 left it, opened by transformers.
        targets: last parts of module names, for example `q_proj`.
        r, alpha: rank of the adapter and its scale, alpha / r.
        master_of: module name → dense master of the packed layer (`Masters.read`).
        seed: decides A; B starts at zero.

    Raises:
        StageError: a target matches no layer, or one that cannot have an adapter.
    """
    _check_targets(model, targets)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] -- PEFT only divides it by r
        target_modules=list(targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )

    def build(target: nn.Module, adapter_name: str, **arguments) -> MaskedLoraLinear:
        return MaskedLoraLinear(target, adapter_name, master_of=master_of, **arguments)

    config._register_custom_module({PackedLinear: build, nn.Linear: build})  # type: ignore[dict-item]
    set_seed(seed)
    return get_peft_model(model, config), config  # type: ignore[return-value]


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    modules = dict(model.named_modules())
    matched = {target: _matches(modules, target) for target in targets}
    unmatched = [target for target, names in matched.items() if not names]
    foreign = [
        name
        for names in matched.values()
        for name in names
        if not isinstance(modules[name], PackedLinear | nn.Linear)
    ]
    if unmatched or foreign:
        known = {n.rpartition(".")[2] for n in modules if ".self_attn." in n and "_proj" in n}
        raise StageError(
            f"lora.target_modules: {', '.join(unmatched or foreign)} cannot get an adapter",
            f"names of shared dense layers: {', '.join(sorted(known))}",
            "no such layer in the model" if unmatched else "not a linear layer",
            "correct lora.target_modules",
        )


def _matches(modules: dict[str, nn.Module], target: str) -> list[str]:
    return [name for name in modules if name == target or name.endswith(f".{target}")]


def count_trainable(model: nn.Module) -> int:
    """Parameters that the optimizer changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def parameter_table(model: nn.Module) -> str:
    """Trainable parameters by kind of layer, as text."""
    counts: Counter[str] = Counter()
    layers: Counter[str] = Counter()
    shapes: dict[str, str] = {}
    for name, layer in masked_layers(model).items():
        kind = name.rpartition(".")[2]
        lora_a, lora_b, _ = layer.adapter()
        counts[kind] += lora_a.numel() + lora_b.numel()
        layers[kind] += 1
        shapes[kind] = f"{layer.out_features} x {layer.in_features}"
    rows = [f"{'layer':10} {'count':>6} {'weight':>14} {'trainable':>14}"]
    rows += [f"{k:10} {layers[k]:>6} {shapes[k]:>14} {counts[k]:>14,}" for k in counts]
    rows.append(f"{'sum':10} {layers.total():>6} {'':>14} {count_trainable(model):>14,}")
    return "\n".join(rows)
