"""LoRA layers for experts and router, with the parameter names and shapes that PEFT saves.

transformers' experts are plain parameters, which PEFT targets by `target_parameters`: it wraps the
module once per parameter and materializes a dense delta of each in every forward pass. Packed
experts have no such parameters. The layers here replace PEFT's through its registry of custom
modules, multiply by A and B without a delta (`kernels/experts/lora.py`), and keep its layout:

    experts.lora_A             the outer wrapper: down_proj, or the only target
    experts.base_layer.lora_A  the inner wrapper: gate_up_proj, if both have adapters
    lora_A.weight              [experts * r, in], expert by expert
    lora_B.weight              [out, r * experts], one rank's columns for all experts at a time

In memory B is [experts, out, r] (expert_factors.py). Around packed experts of which this process
holds some, the matrices are those of the held experts, with the values that one process draws.

`name_targets` sets PEFT's config to match, so a saved adapter opens in plain PEFT on transformers'
gpt-oss in bf16; for its attention layers, see the caveat in bake.py.

Expert adapters are not trained through the rounding to MXFP4: `ExpertLora.merge_packed` rounds the
sum at the end and reports the loss. The router is trained through the rounding of its sum to bf16,
as the attention layers are through theirs, so the stored weight equals the trained one bit for bit.
Not supported: dropout, several adapters at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.func import functional_call
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from sparselong.adapters.expert_factors import ExpertA, ExpertB
from sparselong.adapters.merge import Rounding, merge_adapter
from sparselong.kernels.dense import sum_weight
from sparselong.kernels.experts import NO_ADAPTERS, Adapter, Adapters
from sparselong.model import PackedExperts

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
"""Expert weights in PEFT's nesting order, innermost first."""


class Merged(NamedTuple):
    """Merged experts: tensors by full name, and rounding statistics by weight name."""

    tensors: dict[str, torch.Tensor]
    rounding: dict[str, Rounding]


class ExpertLora(nn.Module, LoraLayer):
    """Adapters of one weight of a layer's held experts, wrapped around the packed experts.

    Attributes:
        takes_residual: as PackedExperts's.

    Args:
        base_layer: PackedExperts, or another weight's ExpertLora around them.
        adapter_name: PEFT's name for the adapter.
        config: PEFT's configuration; its dropout must be 0.
        weight_name: "gate_up_proj" or "down_proj".
        name: name of the experts in the model.
        r: rank.
        lora_alpha: sets the scale, s = lora_alpha / r.
        dtype: in which A and B are trained.
    """

    takes_residual = True

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        *,
        weight_name: str,
        name: str,
        r: int,
        lora_alpha: float,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.weight_name, self.name, self.dtype = weight_name, name, dtype
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    @property
    def packed_experts(self) -> PackedExperts:
        """The innermost wrapped module, the packed experts."""
        base = self.get_base_layer()
        assert isinstance(base, PackedExperts)
        return base

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        _, out_features, groups, _ = getattr(module, f"{self.weight_name}_blocks").shape
        return 32 * groups, out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: Any, config: Any, **_: Any):
        """Create A (random) and B (zero) of the held experts; called by PEFT.

        The values of all experts are drawn, as by PEFT, whatever part is held.
        """
        if config.lora_dropout:
            raise ValueError(f"{self.name}: dropout on expert adapters is not supported")
        held, experts = self.packed_experts.held, self.packed_experts.total
        columns = r * experts
        width, out = self._get_in_out_features(self.packed_experts)
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / r
        self.lora_bias[adapter_name] = False
        like: dict[str, Any] = {"bias": False, "dtype": torch.float32}
        self.lora_A[adapter_name] = nn.Linear(width, columns, **like)
        self.lora_B[adapter_name] = nn.Linear(columns, out, **like)
        self.reset_lora_parameters(adapter_name, True)
        for part, kind in ((self.lora_A, ExpertA), (self.lora_B, ExpertB)):
            matrix: Any = part[adapter_name].weight
            part[adapter_name] = kind(matrix, held, experts, self.dtype)
        self.set_adapter(self.active_adapters)

    def adapter(self) -> Adapter:
        """Return A [experts, r, in], B [experts, out, r] and s; views of the parameters.

        Experts are those that this process holds.
        """
        name = self.active_adapters[0]
        a, b = (getattr(self, part)[name].weight for part in ("lora_A", "lora_B"))
        return Adapter(a.view(len(b), -1, self.in_features), b, self.scaling[name])

    def adapters(self) -> dict[str, Adapter]:
        """Return this weight's adapter and the inner layer's, by weight name."""
        inner = self.base_layer.adapters() if isinstance(self.base_layer, ExpertLora) else {}
        return {**inner, self.weight_name: self.adapter()}

    def forward(
        self,
        hidden_states: torch.Tensor,
        *routing: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the experts on [tokens, hidden]; `routing`: indices and weights [tokens, top_k].

        A residual is added to their output, as by PackedExperts.
        """
        adapters = NO_ADAPTERS
        if not self.disable_adapters:
            found = self.adapters()
            adapters = Adapters(*(found.get(name) for name in EXPERT_WEIGHTS))
        return self.packed_experts(hidden_states, *routing, adapters=adapters, residual=residual)

    def merge_packed(self) -> Merged:
        """Merge all adapters of these experts into new MXFP4 weights; the layer is unchanged.

        The tensors are those of the experts that this process holds.
        """
        tensors, rounding = {}, {}
        for weight, adapter in self.adapters().items():
            names = (f"{weight}_blocks", f"{weight}_scales")
            blocks, scales = (getattr(self.packed_experts, name) for name in names)
            *merged, rounding[weight] = merge_adapter(blocks, scales, adapter)
            tensors |= {f"{self.name}.{n}": t for n, t in zip(names, merged, strict=True)}
        return Merged(tensors, rounding)

    def merged_shapes(self) -> dict[str, torch.Tensor]:
        """Return what `merge_packed` makes, of all the layer's experts, on the meta device."""
        experts, found = self.packed_experts, {}
        for name in (n for w in self.adapters() for n in (f"{w}_blocks", f"{w}_scales")):
            held: torch.Tensor = getattr(experts, name)
            whole = held.new_empty((experts.total, *held.shape[1:]), device="meta")
            found[f"{self.name}.{name}"] = whole
        return found


class _Round(torch.autograd.Function):
    """Rounds fp32 to bf16, stored in `dtype`, with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, total: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return total.to(torch.bfloat16).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.float(), None


class RouterLora(nn.Module, LoraLayer):
    """Router with the weight bf16(W + s·B·A); bias and top-k selection are unchanged.

    Args:
        base_layer: transformers' router.
        adapter_name: PEFT's name for the adapter.
        config: PEFT's configuration; its dropout must be 0.
        name: name of the router in the model.
        r: rank.
        lora_alpha: sets the scale, s = lora_alpha / r.
    """

    def __init__(
        self,
        base_layer: GptOssTopKRouter,
        adapter_name: str,
        config: LoraConfig,
        *,
        name: str,
        r: int,
        lora_alpha: Any,
    ):
        super().__init__()
        self.name = name
        LoraLayer.__init__(self, base_layer)
        if config.lora_dropout:
            raise ValueError(f"{name}: dropout on a router's adapter is not supported")
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)
        device = base_layer.weight.device
        for part in (self.lora_A, self.lora_B):
            part[adapter_name].to(device=device, dtype=torch.float32)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.hidden_dim, module.num_experts

    def adapter(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return A [r, hidden], B [experts, r] and s."""
        name = self.active_adapters[0]
        a, b = (getattr(self, part)[name].weight for part in ("lora_A", "lora_B"))
        return a, b, self.scaling[name]

    def effective_weight(self) -> torch.Tensor:
        """Return the forward pass's weight [experts, hidden]: bf16 values in W's dtype."""
        weight: torch.Tensor = self.get_base_layer().weight  # pyright: ignore[reportAssignmentType]
        rounded: Any = _Round.apply(sum_weight(weight, *self.adapter()), weight.dtype)
        return rounded

    def forward(self, hidden_states: torch.Tensor) -> Any:
        """Return logits, routing weights and indices, as transformers' router does."""
        router = self.get_base_layer()
        if self.disable_adapters:
            return router(hidden_states)
        return functional_call(router, {"weight": self.effective_weight()}, (hidden_states,))

    @torch.no_grad()
    def packed(self) -> dict[str, torch.Tensor]:
        """Return the weight to store, by its full name."""
        return {f"{self.name}.weight": self.effective_weight().to(torch.bfloat16)}


def add_expert_lora(
    experts: nn.Module,
    adapter_name: str,
    config: LoraConfig,
    *,
    weights: tuple[str, ...],
    name: str,
    r: int,
    lora_alpha: float,
    dtype: torch.dtype = torch.float32,
) -> ExpertLora:
    """Wrap PackedExperts in one ExpertLora per weight, nested as PEFT nests its wrappers."""
    for weight in EXPERT_WEIGHTS:
        if weight in weights:
            experts = ExpertLora(
                experts,
                adapter_name,
                config,
                weight_name=weight,
                name=name,
                r=r,
                lora_alpha=lora_alpha,
                dtype=dtype,
            )
    assert isinstance(experts, ExpertLora)
    return experts


def name_targets(config: LoraConfig, weights: tuple[str, ...], expert_r: int, router: bool) -> None:
    """Set the saved config to target experts and router as plain PEFT does."""
    parameters = [f"mlp.experts.{weight}" for weight in EXPERT_WEIGHTS if weight in weights]
    config.rank_pattern = dict.fromkeys(parameters, expert_r)
    config.target_parameters = [*parameters, *(["mlp.router.weight"] if router else [])]
    config.target_modules = set(config.target_modules or ()) - {"experts", "router"}
