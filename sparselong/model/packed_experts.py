"""gpt-oss's experts with their weights kept in MXFP4.

A drop-in replacement for transformers' GptOssExperts: same call, same result on the decoded
weights. Gradients flow to the input and the routing weights; the packed weights are frozen. Tensors
keep the checkpoint's names, shapes and layout, so loading only copies bytes. The arithmetic is in
`kernels/experts/op.py`: on a GPU weights are decoded as they are multiplied, on a CPU one expert at
a time.

A module that is made inside `using(expert_placement="host")` keeps blocks and scales in host memory
(host_experts.py), and its other tensors on the model's device.

A module that is made inside `using(experts=...)` holds only this process's experts. Its passes run
inside the same setting, whose exchange computes the others' share in the processes that hold them.

transformers registers them as the experts implementation `sparselong`, which a packed model's
configuration names. If the experts are not packed, its function raises and names the fix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig

from sparselong.checkpoint import expert_shapes
from sparselong.kernels import ExpertStack, HostStack, PackedWeight, leave_graph
from sparselong.kernels.experts import ALPHA, LIMIT, NO_ADAPTERS, Adapters, expert_mlp
from sparselong.model.host_experts import HostExperts
from sparselong.model.part import Part
from sparselong.packing import mxfp4
from sparselong.runtime import current

IMPLEMENTATION = "sparselong"
PACKED = ("gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales")
"""The tensors that may be in host memory, in the order in which they lie there."""


class PackedExperts(Part):
    """Packed experts of one layer, or the part of them that `using(experts=...)` says.

    Attributes:
        takes_residual: whether `forward` adds a residual; transformers' experts do not.
        is_on_host: whether blocks and scales are, or will be, in host memory.
        host: that memory, of all layers, once the model is opened.
        layer: index of the layer in it.
    """

    takes_residual = True

    def __init__(self, config: GptOssConfig):
        exchange, self.num_experts = current().experts, config.num_local_experts
        whole = range(self.num_experts)
        super().__init__(exchange.held(len(whole)) if exchange else whole, len(whole))
        self.alpha, self.limit = ALPHA, LIMIT
        self.is_on_host = current().expert_placement == "host"
        self.host: HostExperts | None = None
        self.layer = 0
        self._sound_scales: tuple[tuple[int, int], ...] | None = None
        for name, (_, *shape) in expert_shapes(config).items():
            shape = (len(self.held), *shape)
            if name.endswith("_bias"):
                parameter = nn.Parameter(torch.empty(shape), requires_grad=False)
                self.register_parameter(name, parameter)
            else:
                self.register_buffer(name, torch.empty(shape, dtype=torch.uint8))

    def stack(self) -> ExpertStack | HostStack:
        """Return the layer's tensors in the form that the kernels take, without copies."""
        gate_up, down = (
            PackedWeight(*(getattr(self, f"{name}_{part}") for part in PackedWeight._fields))
            for name in ("gate_up_proj", "down_proj")
        )
        if self.host is None:
            return ExpertStack(gate_up, down)
        return HostStack(gate_up, down, self.host.device, partial(self.host.fetch, self.layer))

    @property
    def is_withheld(self) -> bool:
        """Whether the module's tensors are read by part.py and not by transformers."""
        return self.is_on_host or super().is_withheld

    def is_in_host_memory(self, name: str) -> bool:
        """Whether a tensor stays in host memory on whatever device the model is."""
        return self.is_on_host and name in PACKED

    def place(self, name: str, like: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the memory into which a withheld tensor is read; see `Part`."""
        if self.host is not None and name in PACKED:
            return self.host.tensors(self.layer)[name]
        return super().place(name, like, device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move or convert the tensors, but not those in host memory."""
        if self.host is None:
            return super()._apply(fn, recurse)
        kept = {name: self._buffers.pop(name) for name in PACKED}
        try:
            return super()._apply(fn, recurse)
        finally:
            self._buffers.update(kept)

    @torch.compiler.assume_constant_result  # torch.compile calls it while it compiles
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
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the weighted sum of each token's expert outputs, [tokens, hidden].

        Args:
            hidden_states: [tokens, hidden].
            router_indices: int64 [tokens, top_k], the experts that each token is routed to.
            routing_weights: [tokens, top_k].
            adapters: low-rank adapters of gate_up and down, applied alongside the weights.
            residual: added to the sum, [tokens, hidden].

        If this process holds only some of the layer's experts, the call is collective.

        Raises:
            ValueError: A scale is NaN, an argument's shape or dtype does not fit, or the pass's
                setting `experts` is not that with which the module was made.
        """
        if torch.compiler.is_compiling():
            arguments = (hidden_states, router_indices, routing_weights, adapters, residual)
            return self._run_in_graph(*arguments)
        exchange = current().experts
        self.check_setting("experts", exchange)
        self._check_scales()
        call = (hidden_states, router_indices, routing_weights, self.stack(), adapters)
        gate: dict[str, Any] = {"alpha": self.alpha, "limit": self.limit}
        if exchange is not None and not self.is_whole:
            out = exchange.run(*call, experts=self.num_experts, **gate)
        elif residual is not None and residual.dtype != hidden_states.dtype:
            out = expert_mlp(*call, **gate)
        else:
            return expert_mlp(*call, residual=residual, **gate)
        return out if residual is None else residual + out

    def _run_in_graph(self, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """Return what `forward` does, for torch.compile."""
        if self.is_on_host:
            return self._run_on_host(x, *arguments)
        if not self.is_whole:
            return self._run_sharded(x, *arguments)
        self._check_scales()
        indices, weights, adapters, residual = arguments
        gate: dict[str, Any] = {"alpha": self.alpha, "limit": self.limit}
        is_summed = residual is not None and residual.dtype == x.dtype
        added = residual if is_summed else None
        out = expert_mlp(x, indices, weights, self.stack(), adapters, residual=added, **gate)
        return out if is_summed or residual is None else residual + out

    @leave_graph("experts in host memory: layers are copied ahead of use, in the passes' order")
    def _run_on_host(self, *arguments: Any) -> torch.Tensor:
        return self.forward(*arguments)

    @leave_graph("experts sharded over several processes, whose exchange is not part of a graph")
    def _run_sharded(self, *arguments: Any) -> torch.Tensor:
        return self.forward(*arguments)


def reserve_host_memory(model: nn.Module, locked: bool) -> None:
    """Reserve memory for those experts of a model that belong in host memory.

    Args:
        model: its experts' tensors may be on the meta device.
        locked: whether to page-lock the memory, which a GPU needs.

    Raises:
        StageError: there is not enough memory, or it cannot be page-locked.
    """
    experts = [m for m in model.modules() if isinstance(m, PackedExperts) and m.is_on_host]
    if not experts:
        return
    shapes = {name: tuple(getattr(experts[0], name).shape) for name in PACKED}
    host = HostExperts(len(experts), shapes, locked)
    for layer, module in enumerate(experts):
        module.host, module.layer = host, layer


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
