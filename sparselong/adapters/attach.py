"""Attach LoRA to a whole model through PEFT's registry of custom modules.

Shared dense layers get masked LoRA; experts and router get adapters if requested.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from sparselong.adapters.expert_factors import count_whole, keep_dtypes
from sparselong.adapters.expert_lora import ExpertLora, RouterLora, add_expert_lora, name_targets
from sparselong.adapters.joined import join_projections
from sparselong.adapters.lora import MaskedLoraLinear
from sparselong.checkpoint import read_header
from sparselong.errors import StageError
from sparselong.model import PackedExperts, PackedLinear

_MASTER_FILE = re.compile(r"layer-\d+\.safetensors")
TunedLayer = MaskedLoraLinear | ExpertLora | RouterLora


@dataclass(frozen=True)
class ExtraAdapters:
    """Adapters in addition to those of the shared dense layers."""

    expert_targets: tuple[str, ...] = ()
    """Any of `gate_up_proj` and `down_proj`."""
    expert_r: int | None = None
    """Rank of each expert's adapter."""
    router: bool = False
    expert_dtype: torch.dtype = torch.float32
    """In which the experts' adapters are trained. Gradients are summed in fp32 and rounded to it;
    updates smaller than its precision are lost."""

    @property
    def modules(self) -> dict[str, type[nn.Module]]:
        """Names of the modules that get an adapter, and their required types."""
        found: dict[str, type[nn.Module]] = {}
        if self.expert_targets:
            found["experts"] = PackedExperts
        if self.router:
            found["router"] = GptOssTopKRouter
        return found


class Masters:
    """Stage 02's dense master weights, read one at a time.

    Args:
        directory: `02_compress/masters`, with one safetensors file per layer. Files with other
            names, such as copies, are not read.

    Raises:
        StageError: a file is damaged, or two hold the same weight.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.files: dict[str, Path] = {}
        for path in sorted(directory.glob("layer-*.safetensors")):
            if not _MASTER_FILE.fullmatch(path.name):
                continue
            for name in read_header(path):
                if name in self.files:
                    raise StageError(
                        f"{path} holds a master that another file holds too",
                        f"one master of {name}",
                        f"another in {self.files[name].name}",
                        "remove the file that does not belong here",
                    )
                self.files[name] = path

    def read(self, module: str) -> torch.Tensor:
        """Return a module's master weight, bf16 [out, in].

        Raises:
            StageError: Stage 02 wrote no master of the module.
        """
        name = f"{module}.weight"
        if name not in self.files:
            raise StageError(
                f"stage 02 wrote no master of {module}",
                f"{name} in {self.directory}",
                f"masters of {len(self.files)} other layers",
                "run it again: python 02_compress.py --force",
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
    extra: ExtraAdapters = ExtraAdapters(),
) -> tuple[PeftModel, LoraConfig]:
    """Replace the target layers by MaskedLoraLinear and freeze everything else.

    Args:
        model: stage 02's model, opened by transformers.
        targets: last parts of module names, for example `q_proj`.
        r: rank of the adapters.
        alpha: sets their scale, alpha / r.
        master_of: module name → dense master of the packed layer (`Masters.read`).
        seed: seed that initializes A; B starts at zero.
        extra: additional adapters on experts and router, with the same alpha.

    Raises:
        StageError: A target matches no layer, or a layer that cannot have an adapter.
    """
    _check_targets(model, targets)
    _check_extra(model, extra)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] -- PEFT only divides it by r
        target_modules=[*targets, *extra.modules],
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )
    config._register_custom_module(_layer_builders(config, master_of, extra))  # type: ignore[arg-type]
    set_seed(seed)
    tuned: Any = get_peft_model(model, config)
    keep_dtypes(tuned)
    join_projections(tuned)
    name_targets(config, extra.expert_targets, extra.expert_r or 0, extra.router)
    return tuned, config


def _layer_builders(
    config: LoraConfig, master_of: Callable[[str], torch.Tensor], extra: ExtraAdapters
) -> dict[type[nn.Module], Callable[..., TunedLayer]]:
    """Return, by type of the target, how PEFT builds the layer that replaces it."""
    r, alpha = config.r, config.lora_alpha

    def build(target: nn.Module, adapter_name: str, **arguments) -> MaskedLoraLinear:
        return MaskedLoraLinear(target, adapter_name, master_of=master_of, **arguments)

    def build_router(target: GptOssTopKRouter, adapter_name: str, **arguments) -> RouterLora:
        name = arguments["target_name"]
        return RouterLora(target, adapter_name, config, name=name, r=r, lora_alpha=alpha)

    def build_experts(target: nn.Module, adapter_name: str, **arguments) -> ExpertLora:
        return add_expert_lora(
            target, adapter_name, config, weights=extra.expert_targets,
            name=arguments["target_name"], r=extra.expert_r or 0, lora_alpha=alpha,
            dtype=extra.expert_dtype,
        )  # fmt: skip

    return {
        PackedLinear: build,
        nn.Linear: build,
        PackedExperts: build_experts,
        GptOssTopKRouter: build_router,
    }


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
            f"lora.target_modules: {', '.join(unmatched or foreign)} cannot have an adapter",
            f"names of shared dense layers: {', '.join(sorted(known))}",
            "no such layer in the model" if unmatched else "not a linear layer",
            "correct lora.target_modules",
        )


def _check_extra(model: nn.Module, extra: ExtraAdapters) -> None:
    modules = dict(model.named_modules())
    for name, kind in extra.modules.items():
        found = [modules[path] for path in _matches(modules, name)]
        if not found or not all(isinstance(module, kind) for module in found):
            key = "lora.expert_targets" if name == "experts" else "lora.router"
            raise StageError(
                f"{key}: the model's {name} cannot have an adapter",
                f"{kind.__name__} in every layer",
                ", ".join(sorted({type(module).__name__ for module in found})) or f"no {name}",
                f"remove {key}, or use a gpt-oss compressed by this project",
            )


def _matches(modules: dict[str, nn.Module], target: str) -> list[str]:
    return [name for name in modules if name == target or name.endswith(f".{target}")]


def tuned_layers(model: nn.Module) -> dict[str, TunedLayer]:
    """Return all layers with an adapter by base model name; a layer's experts count as one."""
    found: dict[str, TunedLayer] = {}
    for module in model.modules():  # an outer ExpertLora comes before the inner one
        if isinstance(module, MaskedLoraLinear | ExpertLora | RouterLora):
            found.setdefault(module.name, module)
    return found


def count_trainable(model: nn.Module) -> int:
    """Return the number of trainable parameters of the whole model, whatever experts are held."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return count_whole(trainable, model)


def parameter_table(model: nn.Module) -> str:
    """Format a table of trainable parameters by kind of layer, with all experts."""
    counts: Counter[str] = Counter()
    layers: Counter[str] = Counter()
    shapes: dict[str, str] = {}
    for name, layer in tuned_layers(model).items():
        if isinstance(layer, ExpertLora):
            held, experts = len(layer.packed_experts.held), layer.packed_experts.total
            adapters = {part: tuple(one[:2]) for part, one in layer.adapters().items()}
        else:
            held, experts = 1, 1
            adapters = {name.rpartition(".")[2]: layer.adapter()[:2]}
        for kind, (lora_a, lora_b) in adapters.items():
            counts[kind] += (lora_a.numel() + lora_b.numel()) * experts // held
            layers[kind] += experts
            shapes[kind] = f"{lora_b.shape[-2]} x {lora_a.shape[-1]}"
    rows = [f"{'layer':12} {'count':>6} {'weight':>14} {'trainable':>14}"]
    rows += [f"{k:12} {layers[k]:>6} {shapes[k]:>14} {counts[k]:>14,}" for k in counts]
    rows.append(f"{'sum':12} {layers.total():>6} {'':>14} {count_trainable(model):>14,}")
    return "\n".join(rows)
