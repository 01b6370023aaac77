"""gpt-oss's experts with their weights kept in MXFP4.

A drop-in replacement for transformers' GptOssExperts: same call, same result on the decoded
weights. Gradients flow to the input and the routing weights; the packed weights are frozen. Tensors
keep the checkpoint's names, shapes and layout, so loading only copies bytes. The arithmetic is in
`kernels/experts/op.py`: on a GPU weights are decoded as they are multiplied, on a CPU one expert at
a time.

A module that is made inside `using(experts=...)` holds only this process's experts. Its passes run
inside the same setting, whose exchange computes the others' share in the processes that hold them.

transformers registers them as the experts implementation `sparselong`, which a packed model's
configuration names. If the experts are not packed, its function raises and names the fix.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig

from sparselong.checkpoint import expert_shapes
from sparselong.kernels import ExpertStack, PackedWeight
from sparselong.kernels.experts import ALPHA, LIMIT, NO_ADAPTERS, Adapters, expert_mlp
from sparselong.model.part import Part
from sparselong.packing import mxfp4
from sparselong.runtime import current

IMPLEMENTATION = "sparselong"


class PackedExperts(Part):
    """Packed experts of one layer, or the part of them that `using(experts=...)` says."""

    def __init__(self, config: GptOssConfig):
        exchange, self.num_experts = current().experts, config.num_local_experts
        whole = range(self.num_experts)
        super().__init__(exchange.held(len(whole)) if exchange else whole, len(whole))
        self.alpha, self.limit = ALPHA, LIMIT
        self._sound_scales: tuple[tuple[int, int], ...] | None = None
        for name, (_, *shape) in expert_shapes(config).items():
            shape = (len(self.held), *shape)
            if name.endswith("_bias"):
                parameter = nn.Parameter(torch.empty(shape), requires_grad=False)
                self.register_parameter(name, parameter)
            else:
                self.register_buffer(name, torch.empty(shape, dtype=torch.uint8))

    def stack(self) -> ExpertStack:
        """Return the layer's tensors in the form that the kernels take, without copies."""
        return ExpertStack(
            *(
                PackedWeight(*(getattr(self, f"{name}_{part}") for part in PackedWeight._fields))
                for name in ("gate_up_proj", "down_proj")
            )
        )

    def _check_scales(self) -> None:
        """Raise if a scale is NaN, checked once per loaded set to avoid host synchronizations."""
        names = ("gate_up_proj_scales", "down_proj_scales")
        scales: list[torch.Tensor] = [getattr(self, name) for name in names]
        found = tuple((tensor.data_ptr(), tensor._version) for tensor in scales)
        if found == self._sound_scales:
            return
        for name, tensor in zip(names, scales, strict=True):
            if bool((tensor == mxfp4.NAN_SCALE).any()):
                raise ValueError(
                    f"{name}: contains 255, which is NaN in E8M0; allowed: 0 to 254. "
                    "The checkpoint is damaged: download its shard again"
                )
        self._sound_scales = found

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_indices: torch.Tensor,
        routing_weights: torch.Tensor,
        adapters: Adapters = NO_ADAPTERS,
    ) -> torch.Tensor:
        """Return the weighted sum of each token's expert outputs, [tokens, hidden].

        Args:
            hidden_states: [tokens, hidden].
            router_indices: int64 [tokens, top_k], the experts that each token is routed to.
            routing_weights: [tokens, top_k].
            adapters: low-rank adapters of gate_up and down, applied alongside the weights.

        If this process holds only some of the layer's experts, the call is collective.

        Raises:
            ValueError: A scale is NaN, an argument's shape or dtype does not fit, or the pass's
                setting `experts` is not that with which the module was made.
        """
        exchange = current().experts
        self.check_setting("experts", exchange)
        self._check_scales()
        call = (hidden_states, router_indices, routing_weights, self.stack(), adapters)
        gate: dict[str, Any] = {"alpha": self.alpha, "limit": self.limit}
        if exchange is None or self.is_whole:
            return expert_mlp(*call, **gate)
        return exchange.run(*call, experts=self.num_experts, **gate)


def refuse_unpacked(experts: nn.Module, *_: Any, **__: Any) -> NoReturn:
    """Reject a model that names the implementation but whose experts are not packed.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"experts_implementation: {IMPLEMENTATION} with {type(experts).__name__}, which are not "
        "packed; allowed: PackedExperts. Open the checkpoint with "
        "from_pretrained(name, config=sparselong.packed_config(name))"
    )
