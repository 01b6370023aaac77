"""gpt-oss's experts with their weights left in MXFP4.

Drop-in for transformers' GptOssExperts: same call, same result on the decoded weights, trainable
through (input and routing weights get gradients, the frozen weights none). Tensors keep the
checkpoint's names, shapes and layout, so loading copies bytes and nothing else. The arithmetic is
`kernels/experts/op.py`'s: on a GPU weights are decoded as they are multiplied, on a CPU one expert
at a time.

transformers knows them as the experts implementation `sparselong`, which a packed model's
configuration names. A model that names it and has other experts says what to do instead.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig

from sparselong.checkpoint import expert_shapes
from sparselong.kernels import ExpertStack, PackedWeight
from sparselong.kernels.experts import ALPHA, LIMIT, NO_ADAPTERS, Adapters, expert_mlp
from sparselong.packing import mxfp4

IMPLEMENTATION = "sparselong"


class PackedExperts(nn.Module):
    """The experts of one layer; see the module's text."""

    def __init__(self, config: GptOssConfig):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.alpha, self.limit = ALPHA, LIMIT
        self._sound_scales: tuple[tuple[int, int], ...] | None = None
        for name, shape in expert_shapes(config).items():
            if name.endswith("_bias"):
                parameter = nn.Parameter(torch.empty(shape), requires_grad=False)
                self.register_parameter(name, parameter)
            else:
                self.register_buffer(name, torch.empty(shape, dtype=torch.uint8))

    def stack(self) -> ExpertStack:
        """The layer's tensors as the kernels take them; no copies."""
        return ExpertStack(
            *(
                PackedWeight(*(getattr(self, f"{name}_{part}") for part in PackedWeight._fields))
                for name in ("gate_up_proj", "down_proj")
            )
        )

    def _check_scales(self) -> None:
        """Looks for NaN scales once for every set of loaded scales; looking costs a host sync."""
        names = ("gate_up_proj_scales", "down_proj_scales")
        scales: list[torch.Tensor] = [getattr(self, name) for name in names]
        found = tuple((tensor.data_ptr(), tensor._version) for tensor in scales)
        if found == self._sound_scales:
            return
        for name, tensor in zip(names, scales, strict=True):
            if bool((tensor == mxfp4.NAN_SCALE).any()):
                raise ValueError(
                    f"{name}: holds 255, which is NaN in E8M0; allowed: 0 to 254. "
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
        """Weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: [tokens, hidden].
            router_indices: int64 [tokens, top_k], the experts of each token.
            routing_weights: [tokens, top_k].
            adapters: low-rank changes of gate_up and of down, multiplied beside the weights.

        Returns:
            [tokens, hidden].

        Raises:
            ValueError: a scale is NaN, or an argument's shape or dtype does not fit.
        """
        self._check_scales()
        return expert_mlp(
            hidden_states,
            router_indices,
            routing_weights,
            self.stack(),
            adapters,
            alpha=self.alpha,
            limit=self.limit,
        )


def refuse_unpacked(experts: nn.Module, *_: Any, **__: Any) -> NoReturn:
    """What the implementation does for experts that are not packed.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"experts_implementation: {IMPLEMENTATION} with {type(experts).__name__}, which are not "
        "packed; allowed: PackedExperts. Open the checkpoint with "
        "from_pretrained(name, config=sparselong.packed_config(name))"
    )
