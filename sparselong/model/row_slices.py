"""A checkpointed layer that computes its rows in slices, for long sequences.

What a decoder layer needs beside attention (norms, projections, router, experts, their backward
passes) is computed for some rows of the sequence at a time, so its working memory does not grow
with the length. Attention needs all keys, and gets queries, keys and values of the whole sequence:

    forward     slices of h → q, k, v;  attention;  slices of (attention's output, h) → output
    backward    slices of h → q, k, v;  attention again;
                slices of (attention's output, h), again and backward → their gradients;
                attention backward;  slices of h, again and backward → h's gradient

Of a layer only its input is kept until backward (`runtime/layer_inputs.py`), as with torch's
checkpoints; results equal these up to the order in which weights' gradients are summed over rows.
`slice_rows` replaces a model's checkpoint function:

    slice_rows(model, rows=16384, inputs=HostInputs())

Source: checkpointing is Chen et al.'s (2016, arXiv:1604.06174); slices of a sequence are those of
tiled MLPs (ALST, Bekman et al. 2025, arXiv:2506.13996). The code is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from sparselong.kernels.experts import split_evenly
from sparselong.model.fused import FusedDecoderLayer, fuse
from sparselong.runtime import (
    DeviceInputs,
    ExpertExchange,
    HostInputs,
    Settings,
    checkpoint_contexts,
    current,
    recomputing,
    restoring,
    using,
)

Inputs = DeviceInputs | HostInputs


def slice_rows(model: Any, rows: int, inputs: Inputs, keep_attention: bool = False) -> None:
    """Make a gpt-oss model's checkpointed layers compute at most `rows` rows at a time.

    Fuses the layers, if they are not fused.

    Args:
        model: a model of transformers, not PEFT's wrapper.
        rows: most tokens per slice, of all sequences of a batch together.
        inputs: where the layers' inputs are kept until backward.
        keep_attention: whether to keep the output of full attention (`runtime/recompute.py`).
    """
    fuse(model)  # models with eager attention are not
    model._set_gradient_checkpointing(
        enable=True,
        gradient_checkpointing_func=partial(
            run_in_slices, rows=rows, inputs=inputs, keep_attention=keep_attention
        ),
    )


def run_in_slices(
    call: partial, hidden: torch.Tensor, *, rows: int, inputs: Inputs, keep_attention: bool
) -> torch.Tensor:
    """Run a layer; the checkpoint function of transformers' layers.

    Args:
        call: the layer's bound `__call__` with its arguments by name.
        hidden: [batch, tokens, hidden], the layer's input.
        rows: most tokens per slice, of all sequences together.
        inputs: where the input is kept.
        keep_attention: whether to keep the output of full attention.
    """
    layer: Any = call.func.__self__  # pyright: ignore[reportFunctionMemberAccess]
    arguments = dict(call.keywords)
    angles = arguments.pop("position_embeddings")
    if hidden.is_leaf:  # the output of frozen embeddings: PEFT requests a gradient, nobody reads it
        hidden = hidden.detach()
    contexts, kind = checkpoint_contexts(keep_attention), hidden.device.type
    parts = _cut(hidden, rows, current().experts)
    precision = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
    job = _Job(layer, arguments, angles, parts, inputs, contexts, current(), precision)
    return _SlicedLayer.apply(job, hidden, *job.parameters)  # pyright: ignore[reportReturnType]


class _Part(NamedTuple):
    """A slice of the tokens, and the exchange of experts for them; None: as for all tokens."""

    tokens: slice
    experts: ExpertExchange | None = None


def _cut(hidden: torch.Tensor, rows: int, experts: ExpertExchange | None) -> list[_Part]:
    """Return the slices of the tokens, at most `rows` of all sequences together in each.

    An exchange of experts needs every process as often as every other. Where the processes have
    different numbers of rows, each divides its own into as many slices as the largest needs, but
    no process into more than it has tokens.
    """
    batch, tokens = hidden.shape[:2]
    exchanges = None if experts is None else experts.divide(rows)
    if exchanges is not None:
        parts = split_evenly(tokens, len(exchanges))
        return [_Part(*pair) for pair in zip(parts, exchanges, strict=True)]
    count = min(tokens, -(-batch * tokens // rows))
    return [_Part(part) for part in split_evenly(tokens, count)]


@dataclass(frozen=True)
class _Job:
    """One pass of one layer.

    Attributes:
        layer: the layer.
        arguments: arguments of its attention, by name.
        angles: cos and sin, [batch or 1, tokens, head_dim / 2].
        parts: the slices.
        inputs: where the layer's input is kept.
        contexts: of the forward pass and of attention's recomputation.
        settings: of the forward pass; they apply to backward too, in whatever thread it runs.
        precision: of the forward pass, likewise: arguments of `torch.autocast`.
    """

    layer: FusedDecoderLayer
    arguments: dict[str, Any]
    angles: tuple[torch.Tensor, torch.Tensor]
    parts: list[_Part]
    inputs: Inputs
    contexts: tuple[AbstractContextManager[None], AbstractContextManager[None]]
    settings: Settings
    precision: tuple[str, torch.dtype, bool]

    @property
    def trained(self) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
        """The trained parameters before, in and after attention."""
        attention: Any = self.layer.self_attn
        before = (self.layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        after = (attention.o_proj, self.layer.post_attention_layernorm, self.layer.mlp)
        sinks = [attention.sinks] if attention.sinks.requires_grad else []
        return _trained(before), sinks, _trained(after)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters, in the order of `trained`."""
        return [parameter for some in self.trained for parameter in some]

    def project(self, hidden: torch.Tensor, part: slice) -> tuple[torch.Tensor, ...]:
        """Return rotated queries and keys, and values, [batch, heads, tokens, head_dim]; hidden."""
        cos, sin = (angle[:, part] for angle in self.angles)
        attention: Any = self.layer.self_attn
        with torch.autocast(*self.precision):
            normed, hidden = self.layer.norm_input(hidden)
            return *attention.project(normed, cos, sin), hidden

    def project_all(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Return queries, keys and values of all tokens, without gradients."""
        whole: list[torch.Tensor] = []
        for part, _ in self.parts:
            made = self.project(hidden[:, part], part)[:3]
            if not whole:
                whole = [_empty_token_major(one, hidden.shape[1]) for one in made]
            for one, place in zip(made, whole, strict=True):
                place[:, :, part] = one
        return whole

    def attend(self, projected: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return attention's output, [batch, tokens, heads * head_dim]."""
        attention: Any = self.layer.self_attn
        with torch.autocast(*self.precision):
            return attention.attend(*projected, **self.arguments)[0].flatten(2)

    def finish(
        self, attended: torch.Tensor, hidden: torch.Tensor, experts: ExpertExchange | None
    ) -> torch.Tensor:
        """Return the layer's output for some rows of attention's output and of its input."""
        changes = {} if experts is None else {"experts": experts}
        with torch.autocast(*self.precision), using(**changes):
            normed, total = self.layer.add_norm(self.layer.self_attn.o_proj(attended), hidden)
            return self.layer.add_experts(normed, total)


class _SlicedLayer(torch.autograd.Function):
    """A layer in slices. The parameters are inputs so that autograd asks for their gradients."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, job: _Job, hidden: torch.Tensor, *parameters: nn.Parameter
    ) -> torch.Tensor:
        with job.contexts[0]:  # for the experts too: a backward pass follows
            projected = job.project_all(hidden)
            with torch.enable_grad():  # the backend is chosen as it is in backward
                attended = job.attend(projected).detach()
            del projected
            out = job.inputs.output(hidden)
            for part, experts in job.parts:
                out[:, part] = job.finish(attended[:, part], hidden[:, part], experts)
        ctx.job, ctx.kept = job, job.inputs.save(hidden, _index(job.layer) == 0)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        job: _Job = ctx.job
        with restoring(job.settings):
            hidden = job.inputs.take(ctx.kept)
            del ctx.job, ctx.kept  # nodes live until the whole backward pass ends
            dhidden, gradients = _differentiate(job, hidden, dout)
        return None, dhidden, *gradients


def _differentiate(
    job: _Job, hidden: torch.Tensor, dout: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Return the gradients of the layer's input and of its trained parameters."""
    before, sinks, after = (_Sums(parameters) for parameters in job.trained)
    projected = [one.requires_grad_() for one in job.project_all(hidden)]
    with job.contexts[1], torch.enable_grad():
        attended = job.attend(projected)
    dattended, dhidden = torch.empty_like(attended), torch.empty_like(hidden)
    for part, experts in job.parts:
        leaves = [whole[:, part].detach().requires_grad_() for whole in (attended, hidden)]
        with recomputing(), torch.enable_grad():
            made = job.finish(leaves[0], leaves[1], experts)
        dattended[:, part], dhidden[:, part] = after.add([made], leaves, [dout[:, part]])
        del made, leaves
    dprojected = sinks.add([attended], projected, [dattended])
    del attended, dattended, projected
    for part, _ in job.parts:
        leaf = hidden[:, part].detach().requires_grad_()
        with recomputing(), torch.enable_grad():
            made = job.project(leaf, part)
        given = [*(one[:, :, part] for one in dprojected), dhidden[:, part]]
        (dhidden[:, part],) = before.add(list(made), [leaf], given)
    return dhidden, before.totals + sinks.totals + after.totals


class _Sums:
    """Sums of parameters' gradients over slices.

    Attributes:
        totals: a sum for each parameter, in its dtype; None: no slice depends on it.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self.totals: list[torch.Tensor | None] = [None] * len(parameters)

    def add(
        self, outputs: list[torch.Tensor], leaves: list[torch.Tensor], given: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Differentiate the outputs; add the parameters' gradients and return the leaves'."""
        wanted = [*leaves, *self.parameters]
        found = torch.autograd.grad(outputs, wanted, given, allow_unused=True)
        for n, gradient in enumerate(found[len(leaves) :]):
            total = self.totals[n]
            if gradient is not None:
                self.totals[n] = gradient if total is None else total.add_(gradient)
        return list(found[: len(leaves)])


def _trained(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def _empty_token_major(like: torch.Tensor, tokens: int) -> torch.Tensor:
    batch, heads, _, dim = like.shape
    return like.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _index(layer: Any) -> int:
    return layer.self_attn.layer_idx
