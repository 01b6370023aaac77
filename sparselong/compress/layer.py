"""One decoder layer: run calibration states through it and compress its attention.

The layer is transformers' own, inside a GptOssModel with one layer and no final norm, so masks and
rotary embedding are transformers' too. Its input states come from the compressed layers before it.
q, k and v are compressed first; o is compressed on the inputs that the compressed q, k and v
produce. The output states are computed from the stored weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import GptOssConfig, GptOssModel
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssDecoderLayer,
    GptOssRotaryEmbedding,
)

from sparselong.compress.fewer_experts import Scorer
from sparselong.compress.hessian import Hessian
from sparselong.compress.solver import Compressed, compress_weight
from sparselong.config import CalibrationSection
from sparselong.errors import StageError
from sparselong.model import NAME, PackedExperts, PackedLinear, fuse
from sparselong.packing import DenseFormat, dense

_TOKENS_PER_FORWARD = 4096


class _NoMlp(nn.Module):
    """Replacement for the experts when only attention is needed."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


@dataclass
class CompressedLayer:
    """Result of compressing a layer: tensors to store, masters, and error by projection."""

    stored: dict[str, torch.Tensor]
    masters: dict[str, torch.Tensor]
    relative_error: dict[str, float]


class CalibratedLayer:
    """A layer on a device, ready to be calibrated, compressed and run.

    Args:
        config: the model's architecture.
        index: the layer's index.
        tensors: the layer's tensors by full name (expert blocks expanded).
        device: device of the computation.
        dtype: dtype of the computation.
        attn_implementation: transformers' name of the attention implementation.
    """

    def __init__(
        self,
        config: GptOssConfig,
        index: int,
        tensors: dict[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
        attn_implementation: str,
    ):
        self.index, self.device = index, device
        single = GptOssConfig.from_dict(config.to_dict())
        single.num_hidden_layers = 1
        single.layer_types = [config.layer_types[index]]
        single._attn_implementation = attn_implementation
        with torch.device("meta"):
            model = GptOssModel(single)
            layer = cast(GptOssDecoderLayer, model.layers[0])
            layer.mlp.experts = PackedExperts(single)
        prefix = f"model.layers.{index}."
        state = {
            name.removeprefix(prefix): tensor.to(
                device, dtype if tensor.is_floating_point() else tensor.dtype
            )
            for name, tensor in tensors.items()
        }
        layer.load_state_dict(state, assign=True)
        unused = {"embed_tokens": nn.Identity(), "norm": nn.Identity()}
        model._modules |= {**unused, "rotary_emb": GptOssRotaryEmbedding(single).to(device)}
        if attn_implementation == NAME:
            fuse(model)
        self.model, self.layer = model.requires_grad_(False).eval(), layer

    def _batches(self, states: torch.Tensor) -> list[torch.Tensor]:
        return list(states.split(max(1, _TOKENS_PER_FORWARD // states.shape[1])))

    def run(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states [sequences, length, hidden] after the layer, on the CPU.

        Raises:
            StageError: a returned state is not finite.
        """
        out = torch.cat([self._forward(batch).cpu() for batch in self._batches(states)])
        if not bool(torch.isfinite(out).all()):
            raise StageError(
                f"calibration failed in layer {self.index}",
                "finite hidden states",
                f"{int((~torch.isfinite(out)).sum())} NaN or infinite values",
                "check the base checkpoint; raise calibration.dampening if it is intact",
            )
        return out

    @torch.no_grad()
    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        output = self.model(inputs_embeds=batch.to(self.device), use_cache=False)
        return output.last_hidden_state

    def _hessian(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Return the Hessian of a projection's inputs over all states, skipping the experts."""
        module = getattr(self.layer.self_attn, name)
        hessian = Hessian(module.in_features, f"layer {self.index}'s {name}", self.device)
        handle = module.register_forward_pre_hook(lambda _module, inputs: hessian.add(inputs[0]))
        mlp, self.layer.mlp = self.layer.mlp, _NoMlp()
        try:
            for batch in self._batches(states):
                self._forward(batch)
        finally:
            handle.remove()
            self.layer.mlp = mlp
        return hessian.matrix

    def score_experts(self, states: torch.Tensor) -> torch.Tensor:
        """Return `Scorer.sums` of the layer's experts over all states."""
        experts = cast(PackedExperts, self.layer.mlp.experts)
        scorer = Scorer(experts)
        self.layer.mlp._modules["experts"] = scorer
        try:
            for batch in self._batches(states):
                self._forward(batch)
        finally:
            self.layer.mlp._modules["experts"] = experts
        return scorer.sums

    def keep_experts(self, kept: list[int]) -> dict[str, torch.Tensor]:
        """Drop all experts but these, and their rows of the router.

        Returns:
            What is left of both, on the CPU in the base's dtypes, by full name.
        """
        mlp, rows = self.layer.mlp, torch.tensor(kept, device=self.device)
        single = GptOssConfig.from_dict(self.model.config.to_dict())
        single.num_local_experts = len(kept)
        with torch.device("meta"):
            experts = PackedExperts(single)
        state = {name: tensor[rows] for name, tensor in mlp.experts.state_dict().items()}
        experts.load_state_dict(state, assign=True)
        mlp._modules["experts"] = experts.requires_grad_(False).eval()
        for name, parameter in mlp.router.named_parameters():
            setattr(mlp.router, name, nn.Parameter(parameter[rows], requires_grad=False))
        mlp.router.num_experts = len(kept)
        return {
            f"model.layers.{self.index}.mlp.{name}": tensor.cpu().to(
                torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
            )
            for name, tensor in mlp.state_dict().items()
        }

    def compress(
        self,
        states: torch.Tensor,
        fmt: DenseFormat,
        calibration: CalibrationSection,
        log: Callable[[str], None],
    ) -> CompressedLayer:
        """Compress q, k, v, then o, and replace the dense layers by the packed ones."""
        result = CompressedLayer({}, {}, {})
        for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",)):  # each group shares inputs
            hessian = self._hessian(names[0], states)
            for name in names:
                full = f"model.layers.{self.index}.self_attn.{name}"
                linear = getattr(self.layer.self_attn, name)
                made = compress_weight(
                    linear.weight, hessian, fmt, calibration.dampening, full, calibration.solver
                )
                packed = self._replace(name, linear, made, fmt)
                result.stored |= {f"{full}.{key}": value for key, value in packed.items()}
                result.masters[f"{full}.weight"] = made.master
                result.relative_error[name] = made.relative_error
        errors = ", ".join(f"{name} {error:.4f}" for name, error in result.relative_error.items())
        log(f"layer {self.index}: relative error {errors}")
        return result

    def _replace(
        self, name: str, linear: nn.Linear, made: Compressed, fmt: DenseFormat
    ) -> dict[str, torch.Tensor]:
        packed = dense.pack(fmt, made.codes, made.mask, made.scale)
        module = PackedLinear(
            linear.in_features, linear.out_features, linear.bias is not None, fmt
        ).to(self.device)
        module.load_state_dict(
            {**packed, **({"bias": linear.bias} if linear.bias is not None else {})}, assign=True
        )
        setattr(self.layer.self_attn, name, module.requires_grad_(False))
        return packed
