"""transformers quantizer for packed checkpoints, which `from_pretrained` opens like any other.

Importing `sparselong` registers the quantization method `sparselong`. Before weights are loaded,
the quantizer replaces the attention projections by PackedLinear and the experts by PackedExperts,
and raises unless the checkpoint holds exactly these tensors (stored.py); they then load by name.
Inside `using(experts=..., vocabulary=...)` only this process's part of them is read (part.py),
inside `using(expert_placement="host")` the experts are read into host memory (host_experts.py).
Nothing is decoded or falls back to bf16; the format and size of each group of weights are printed
to stderr. If the model attends through `sparselong`, its
norms and rotary embeddings are fused too (fused.py).

The same quantizer opens an upstream checkpoint with packed experts (`weight_bits=16`,
`sparsity="none"`); see loading.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparselong.checkpoint import METHOD, PROJECTIONS, expert_shapes, unpack_two_four_experts
from sparselong.errors import StageError
from sparselong.model.description import describe_weights
from sparselong.model.host_embedding import move_embedding
from sparselong.model.host_experts import find_host_experts
from sparselong.model.packed_experts import IMPLEMENTATION, PackedExperts, reserve_host_memory
from sparselong.model.packed_linear import PackedLinear
from sparselong.model.part import read_withheld, withhold
from sparselong.model.stored import refuse_mismatch
from sparselong.model.vocabulary import divide_vocabulary
from sparselong.packing import DenseFormat, mxfp4, two_four

_FIELDS: dict[str, tuple[int | str, ...]] = {
    "weight_bits": (4, 8, 16),
    "sparsity": ("2:4", "none"),
    "group_size": (32, 64),
    "expert_sparsity": ("2:4", "none"),
}
"""Allowed values in the quantization_config of a config.json."""


class SparseLongConfig(QuantizationConfigMixin):
    """Storage of the packed weights, as config.json describes it.

    Args:
        weight_bits: bits per weight of the attention projections (DenseFormat).
        sparsity: sparsity of the attention projections.
        group_size: weights per scale of the attention projections.
        expert_sparsity: `none`: MXFP4 as published; `2:4`: kept codes and patterns, expanded to
            MXFP4 when loaded.

    Raises:
        ValueError: A value is not allowed.
    """

    def __init__(
        self,
        weight_bits: Literal[4, 8, 16] = 4,
        sparsity: Literal["2:4", "none"] = "2:4",
        group_size: int = 64,
        expert_sparsity: Literal["2:4", "none"] = "none",
        **_ignored: Any,
    ):
        found = (weight_bits, sparsity, group_size, expert_sparsity)
        for name, value, allowed in zip(_FIELDS, found, _FIELDS.values(), strict=True):
            if value not in allowed:
                raise ValueError(
                    f"quantization_config.{name}: {value!r}; allowed: "
                    f"{', '.join(map(str, allowed))}. Its config.json is damaged, or was written "
                    "by a later version"
                )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.weight_bits: Literal[4, 8, 16] = weight_bits
        self.sparsity: Literal["2:4", "none"] = sparsity
        self.group_size, self.expert_sparsity = group_size, expert_sparsity

    @property
    def dense_format(self) -> DenseFormat:
        """Storage format of the attention projections."""
        return DenseFormat(self.weight_bits, self.sparsity, self.group_size)


class _ExpandExperts(ConversionOps):
    """Expands kept codes and patterns to MXFP4 blocks while loading."""

    def convert(self, input_dict, source_patterns, target_patterns, **_kwargs):
        kept, patterns = (
            value[0] if isinstance(value, list) else value
            for value in (input_dict[pattern] for pattern in source_patterns)
        )
        return {target_patterns[0]: unpack_two_four_experts(kept, patterns)}


class SparseLongQuantizer(HfQuantizer):
    """Quantizer that installs packed modules before loading; gradients flow through them."""

    quantization_config: SparseLongConfig
    _directory: Path
    _is_partial: bool = False

    def __init__(self, quantization_config: SparseLongConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._withheld: dict[str, torch.Tensor] = {}

    @property
    def _has_sparse_experts(self) -> bool:
        """Whether experts are stored in 2:4 form."""
        return self.quantization_config.expert_sparsity == "2:4"

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the model's dtype; raise ValueError unless it is bfloat16 or float32."""
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f"a sparselong checkpoint computes in bfloat16 or float32, not {dtype}: its "
                "weights are products of bf16 scales, which float16 cannot hold"
            )
        return dtype

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        device_map: Any = None,
        **_kwargs: Any,
    ) -> None:
        replace_with_packed(model, self.quantization_config.dense_format)
        if checkpoint_files:  # none if the caller passes a state dict
            refuse_mismatch(model, checkpoint_files, self._has_sparse_experts)
            self._directory = Path(checkpoint_files[0]).parent
        reserve_host_memory(model, _may_use_gpu(device_map))
        self._withheld = withhold(model)
        self._is_partial = bool(self._withheld)
        if self._withheld and not checkpoint_files:
            _refuse(
                "a model with a part of experts or vocabulary, or with experts in host memory, "
                "cannot be opened",
                "safetensors files, of which each process reads its part",
                "a state dict",
                "pass the checkpoint's directory to from_pretrained",
            )
        # A shard that is hard-linked from the base still contains the dense weights that the packed
        # ones replace; the index does not list them.
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            r"self_attn\.[qkvo]_proj\.weight$",
            *{rf"^{re.escape(name.rpartition('.')[0])}\." for name in self._withheld},
        }

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_kwargs: Any) -> None:
        # Imported here because either module may be importing this one.
        from sparselong.model.attention import NAME
        from sparselong.model.fused import fuse

        if self._withheld:
            read_withheld(model, self._withheld, self._directory, self._has_sparse_experts)
            self._withheld = {}
        host = find_host_experts(model)
        if host is not None:
            host.start(model.device)
            move_embedding(model)
        if model.config._attn_implementation == NAME:
            fuse(model)
        check_packed(model)
        print(describe_weights(model), file=sys.stderr, flush=True)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Return the conversions that expand 2:4 experts while transformers loads them."""
        if not self._has_sparse_experts or any("experts" in name for name in self._withheld):
            return []
        return [
            WeightConverter(
                source_patterns=[f"{name}_kept", f"{name}_patterns"],
                target_patterns=f"{name}_blocks",
                operations=[_ExpandExperts()],
            )
            for name in ("gate_up_proj", "down_proj")
        ]

    def is_serializable(self) -> bool:
        """Return whether the loaded tensors can be saved as they are."""
        return not (self._has_sparse_experts or self._is_partial)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Refuse to save a sharded model, whose gathered weights transformers discards here.

        Raises:
            StageError: this process holds only shards of parameters (FSDP, ZeRO-3).
        """
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
                _refuse(
                    "a sharded model cannot be saved by its quantizer: transformers would discard "
                    "the weights that were gathered for it",
                    "whole parameters",
                    f"a shard of {name}",
                    "set model.hf_quantizer = None before saving, as "
                    "examples/transformers_trainer.py does",
                )
        return None, {}

    @property
    def is_trainable(self) -> bool:
        """Return True: gradients flow through the frozen packed weights."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Return True, which transformers' trainer requires without PEFT."""
        return True


def _may_use_gpu(device_map: Any) -> bool:
    """Return whether `from_pretrained` may put the model on a GPU."""
    if device_map is None or not torch.cuda.is_available():
        return False
    places = device_map.values() if isinstance(device_map, dict) else (device_map,)
    return any(str(place) != "cpu" for place in places)


def check_packed(model: PreTrainedModel) -> None:
    """Raise if a packed tensor's shape, dtype or codes are invalid; transformers does not check.

    Raises:
        StageError: A tensor does not match the configuration; the message names it.
    """
    for path, module in model.named_modules():
        if isinstance(module, PackedExperts):
            shapes = expert_shapes(cast(Any, model.config))
            wanted = {name: (len(module.held), *shape[1:]) for name, shape in shapes.items()}
            kinds = {name: torch.uint8 for name in wanted if not name.endswith("_bias")}
        elif isinstance(module, PackedLinear):
            empty = module.fmt.empty(module.out_features, module.in_features)
            wanted = {name: tuple(tensor.shape) for name, tensor in empty.items()}
            kinds = {n: t.dtype for n, t in empty.items() if not t.is_floating_point()}
        else:
            continue
        for name, shape in wanted.items():
            tensor: torch.Tensor = getattr(module, name)
            kind = kinds.get(name, tensor.dtype)
            if (tuple(tensor.shape), tensor.dtype) != (shape, kind):
                _refuse(
                    f"{path}.{name} does not have the shape and dtype from config.json",
                    f"{kind} {list(shape)}",
                    f"{tensor.dtype} {list(tensor.shape)}",
                )
        _check_codes(path, module)


def _check_codes(path: str, module: PackedExperts | PackedLinear) -> None:
    """Raise on NaN scales and undefined patterns, which kernels would read without an error."""
    if isinstance(module, PackedExperts):
        for name in ("gate_up_proj_scales", "down_proj_scales"):
            scales: torch.Tensor = getattr(module, name)
            if not scales.is_meta and bool((scales == mxfp4.NAN_SCALE).any()):
                _refuse(f"{path}.{name} is damaged", "E8M0 bytes from 0 to 254", "255, NaN")
    elif module.fmt.is_sparse:
        mask = module.packed()["weight_mask"]
        try:
            if not mask.is_meta:
                two_four.unpack_mask(mask)
        except ValueError as error:
            _refuse(f"{path}.weight_mask is damaged", "2:4 patterns from 0 to 5", str(error))


def _refuse(
    what: str,
    expected: str,
    found: str,
    fix: str = "download the checkpoint again, or redo the stage that wrote it",
) -> NoReturn:
    raise StageError(what, expected, found, fix)


def replace_with_packed(model: nn.Module, fmt: DenseFormat) -> None:
    """Replace gpt-oss's experts, and its attention projections if packed, in place.

    Inside `using(experts=..., vocabulary=...)` the experts, the embedding and lm_head that replace
    the model's hold only this process's part.

    Raises:
        ValueError: The model has no gpt-oss experts.
    """
    layers = [module for module in model.modules() if hasattr(module, "self_attn")]
    if not layers or not all(hasattr(layer.mlp, "experts") for layer in layers):
        raise ValueError("the sparselong format supports gpt-oss models only")
    for layer in layers:
        attention = cast(Any, layer.self_attn)
        cast(nn.Module, layer.mlp).experts = PackedExperts(attention.config)
        attention.config._experts_implementation = IMPLEMENTATION
        if not (fmt.is_sparse or fmt.is_quantized):
            continue
        for name in PROJECTIONS:
            linear = getattr(attention, name)
            packed = PackedLinear(
                linear.in_features, linear.out_features, linear.bias is not None, fmt
            )
            setattr(attention, name, packed)
    divide_vocabulary(model)
