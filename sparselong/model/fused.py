"""Fused norms, residual sums, rotary embedding and router of gpt-oss, and the chunked loss.

`fuse(model)` runs each layer's norms, its residual sum before the experts, its rotary embedding and
its router as one kernel each; packed experts add the residual in their last one. Our quantizer
calls it on models that attend through `sparselong`, so stages 02, 03 and 04 need no flag; for any
other gpt-oss, call `sparselong.fuse(model)`. Only the given model changes: its modules become
subclasses of transformers' own, and names, parameters, hooks, PEFT's layers and gradient
checkpointing are unaffected. On a CPU transformers' code runs.

`chunk_loss(model)` makes the model's forward pass with labels return the loss without logits, on
any device; stage 03 trains and evaluates that way. Without labels, or if the router's loss is
requested, transformers' forward runs.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import GptOssForCausalLM
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssAttention,
    GptOssDecoderLayer,
    GptOssMLP,
    GptOssRMSNorm,
    GptOssTopKRouter,
)
from transformers.utils.generic import can_return_tuple

from sparselong.kernels.layer import (
    Router,
    add_rms_norm,
    rms_norm,
    rms_norm_and_input,
    rotate,
    route,
)
from sparselong.model.vocabulary import ChunkedHead, PartialHead, sum_losses
from sparselong.parallel import count_supervised, shift_labels


class FusedRMSNorm(GptOssRMSNorm):
    """RMSNorm as one kernel. Liger, which would replace its forward pass, is refused."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "casting_mode":  # the first that only Liger sets in a norm that it replaces
            raise ValueError(_LIGER)
        super().__setattr__(name, value)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., hidden] → [..., hidden]."""
        if not hidden_states.is_cuda:
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class FusedAttention(GptOssAttention):
    """Attention whose two rotary embeddings are one kernel.

    Attributes:
        joined: computes the three projections and the rotation together (`adapters/joined.py`);
            None: the projections run one by one.
    """

    joined: Any = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See transformers' GptOssAttention; ValueError if Liger has replaced its rotary."""
        if modeling_gpt_oss.apply_rotary_pos_emb.__module__.startswith("liger_kernel"):
            raise ValueError(_LIGER)
        if not hidden_states.is_cuda:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        projected = self.project(hidden_states, *position_embeddings)
        output, weights = self.attend(*projected, attention_mask, past_key_values, **kwargs)
        return self.o_proj(output.flatten(2)), weights

    def project(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rotated queries and keys, and values, [batch, heads, tokens, head_dim]."""
        if self.joined is not None and self.joined.is_usable:
            return self.joined(hidden_states, cos, sin)
        shape = hidden_states.shape[:-1]
        query, key, value = (
            projection(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return *rotate(query, key, cos, sin), value

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return attention's output, [batch, tokens, heads, head_dim], and its weights if any."""
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            str(self.config._attn_implementation), modeling_gpt_oss.eager_attention_forward
        )
        return attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            s_aux=self.sinks,
            **kwargs,
        )


class FusedRouter(GptOssTopKRouter):
    """Router that `FusedMLP` runs as one kernel."""

    broken: torch.Tensor | None = None

    def watch(self, broken: torch.Tensor) -> None:
        """Set `broken`, bool [1] on the router's device, to True at logits that are not finite."""
        self.broken = broken

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return logits, weights and indices; see transformers' GptOssTopKRouter."""
        outputs = super().forward(hidden_states)
        if self.broken is not None:
            self.broken.logical_or_(torch.isfinite(outputs[0].detach()).all().logical_not())
        return outputs

    def fused(self, hidden_states: torch.Tensor) -> Router | None:
        """Return what runs the router in one kernel; None if that cannot be done.

        Hooks, with which transformers records logits, see those of `forward`.
        """
        kind = hidden_states.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        router = Router(self.weight, self.bias, self.top_k, self.broken)
        is_plain = self._forward_hooks or precision not in (None, hidden_states.dtype)
        return router if router.takes(hidden_states) and not is_plain else None


class FusedMLP(GptOssMLP):
    """Router and experts, with the router as one kernel, and the residual sum after them."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the experts' weighted sums, in the input's shape, and the weights."""
        router = self._find_router(hidden_states)
        if router is None:
            return super().forward(hidden_states)
        rows, weights, indices = route(hidden_states.flatten(0, -2), router)
        return self.experts(rows, indices, weights).view_as(hidden_states), weights

    def add_to(self, residual: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the sum of a residual and of `forward`'s first output, both of one shape.

        The experts add the residual in their last kernel, unless hooks ask for their output alone.
        """
        experts: Any = self.experts
        hooks = self._forward_hooks or experts._forward_hooks
        if hooks or not getattr(experts, "takes_residual", False):
            return residual + self(hidden_states)[0]
        rows, router = hidden_states.flatten(0, -2), self._find_router(hidden_states)
        if router is None:
            _, weights, indices = self.router(rows)
        else:
            rows, weights, indices = route(rows, router)
        added = experts(rows, indices, weights, residual=residual.flatten(0, -2))
        return added.view_as(hidden_states)

    def _find_router(self, hidden_states: torch.Tensor) -> Router | None:
        """Return what runs the router in one kernel; None if that cannot be done."""
        module: Any = self.router
        return module.fused(hidden_states) if type(module) is FusedRouter else None


class FusedDecoderLayer(GptOssDecoderLayer):
    """Decoder layer whose residual sums are part of kernels for norms and experts.

    Also in the backward pass.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See transformers' GptOssDecoderLayer."""
        if not hidden_states.is_cuda:
            return super().forward(hidden_states, *args, **kwargs)
        return self._forward_fused(hidden_states, *args, **kwargs)

    def _forward_fused(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        normed, hidden_states = self.norm_input(hidden_states)
        attended, _ = self.self_attn(
            hidden_states=normed,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        normed, total = self.add_norm(attended, hidden_states)
        del attended  # freed before the expert pass
        return self.add_experts(normed, total)

    def norm_input(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (norm of the layer's input, the input), for attention and the residual sum."""
        norm = self.input_layernorm
        return rms_norm_and_input(hidden_states, norm.weight, norm.variance_epsilon)

    def add_norm(
        self, attended: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (norm of the sum, the sum) of attention's contribution and the layer's input."""
        norm = self.post_attention_layernorm
        return add_rms_norm(attended, hidden_states, norm.weight, norm.variance_epsilon)

    def add_experts(self, normed: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Return the layer's output from `add_norm`'s results."""
        mlp: Any = self.mlp
        return mlp.add_to(total, normed) if isinstance(mlp, FusedMLP) else total + mlp(normed)[0]


# FSDP's and DeepSpeed's configurations name the layer, and accelerate compares this name.
FusedDecoderLayer.__name__ = GptOssDecoderLayer.__name__

_LIGER = (
    "model: Liger's norms or rotary embedding; allowed in a fused model: transformers' own, whose "
    'place fuse takes. Set liger_kernel_config={"rms_norm": False, "rope": False}, or do not fuse'
)
_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    GptOssRMSNorm: FusedRMSNorm,
    GptOssAttention: FusedAttention,
    GptOssDecoderLayer: FusedDecoderLayer,
    GptOssMLP: FusedMLP,
    GptOssTopKRouter: FusedRouter,
}


def fuse(model: nn.Module) -> None:
    """Run a gpt-oss model's norms, residual sums, rotary and routers as one kernel each on a GPU.

    Outputs and gradients equal transformers' up to rounding; the kernels round once where
    transformers rounds several times. A second call changes nothing.

    Args:
        model: a gpt-oss model of transformers, with or without a head, wrapped by PEFT or not.

    Raises:
        ValueError: The model has no gpt-oss layers, or Liger's norms or rotary embedding.
    """
    modules = list(model.modules())
    if not any(isinstance(module, GptOssDecoderLayer) for module in modules):
        raise ValueError(f"model: {type(model).__name__} without gpt-oss layers; allowed: gpt-oss")
    rotary = modeling_gpt_oss.apply_rotary_pos_emb.__module__
    if rotary.startswith("liger_kernel") or any("casting_mode" in vars(m) for m in modules):
        raise ValueError(_LIGER)
    for module in modules:
        if type(module) in _FUSED:
            module.__class__ = _FUSED[type(module)]


def watch_routers(model: nn.Module) -> tuple[list[str], torch.Tensor]:
    """Make a model's routers record whether they compute logits that are not finite.

    Args:
        model: a gpt-oss model on its device, fused or not, wrapped by PEFT or not.

    Returns:
        The routers' names; their flags, bool [routers], which passes set to True.
    """
    routers = {n: m for n, m in model.named_modules() if isinstance(m, GptOssTopKRouter)}
    device = next(iter(routers.values())).weight.device
    flags = torch.zeros(len(routers), dtype=torch.bool, device=device)
    for router, flag in zip(routers.values(), flags.split(1), strict=True):
        router.__class__ = FusedRouter
        cast(FusedRouter, router).watch(flag)
    return list(routers), flags


def chunk_loss(model: nn.Module) -> None:
    """Make the model's forward pass with labels compute the loss in chunks, without logits.

    The loss is transformers' (labels shifted by one, -100 ignored, the sum divided by
    `num_items_in_batch` or by the number of labels); `logits` is None. The forward pass raises
    ValueError unless `lm_head` is frozen.

    Raises:
        ValueError: The model is not a GptOssForCausalLM (PEFT's wrappers contain one).
    """
    if not isinstance(model, GptOssForCausalLM):
        raise ValueError(f"model: {type(model).__name__}; allowed: GptOssForCausalLM")
    if type(model.lm_head) is nn.Linear:
        model.lm_head.__class__ = ChunkedHead
    model.forward = types.MethodType(_forward, model)


@can_return_tuple
def _forward(
    self: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    use_cache: bool | None = None,
    output_router_logits: bool | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs: Any,
) -> MoeCausalLMOutputWithPast:
    """GptOssForCausalLM's forward pass, with the loss computed from the hidden states."""
    given: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
    }
    if output_router_logits is None:
        output_router_logits = self.config.output_router_logits
    if labels is None or output_router_logits:
        if num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = num_items_in_batch
        return GptOssForCausalLM.forward(
            self,
            labels=labels,  # pyright: ignore[reportArgumentType]
            output_router_logits=output_router_logits,
            logits_to_keep=logits_to_keep,
            **given,
            **kwargs,
        )
    shifted = kwargs.pop("shift_labels", None)
    outputs: Any = self.model(**given, output_router_logits=False, **kwargs)
    loss = causal_loss(outputs.last_hidden_state, self.lm_head, labels, shifted, num_items_in_batch)
    return MoeCausalLMOutputWithPast(
        loss=loss,  # pyright: ignore[reportArgumentType]
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def causal_loss(
    hidden: torch.Tensor,
    head: nn.Linear | PartialHead,
    labels: torch.Tensor,
    shifted: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Compute transformers' ForCausalLMLoss from the last hidden states.

    Args:
        hidden: [batch, tokens, width].
        head: lm_head, [vocab, width], or the part of it that this process holds.
        labels: int64 [batch, tokens], label t is the token at t; -100 is ignored.
        shifted: the labels shifted so that label t is the token after t, if already available.
        num_items_in_batch: divisor of the sum; None divides by the number of labels here.
    """
    if shifted is None:
        shifted = shift_labels(labels)
    rows, shifted = hidden.flatten(0, 1), shifted.reshape(-1).to(hidden.device)
    total = (
        head(rows, shifted) if isinstance(head, ChunkedHead) else sum_losses(head, rows, shifted)
    )
    if num_items_in_batch is None:
        return total / count_supervised(shifted)
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
