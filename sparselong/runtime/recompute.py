"""Skip the parts of a checkpointed layer's recomputation whose results are cheap to keep.

Activation checkpointing runs a layer in the forward pass, drops its saved tensors, and recomputes
them in the backward pass. Plain checkpointing recomputes the whole layer. A gpt-oss layer can skip:

- Full attention. Its cost is quadratic in the length, but its results (out and lse) take only one
  and a half times a checkpoint's memory. `attend_once` keeps them in the forward pass and returns
  the same bits in the recomputation. Sliding-window attention is cheap and is recomputed.
- Keys that a window layer receives from other processes (`parallel/sequence/attention.py`), and
  the router's choice (`kernels/layer/router.py`). `compute_once` keeps them, which takes little
  memory.
- The experts' output. The experts come last in a layer, so the recomputation does not need it.
  Their backward pass needs gate_up's output, several times the size of a checkpoint. It is
  recomputed from the experts' input, or kept with `keep_experts` (`kernels/experts/op.py`): in the
  last layers of a model, whose backward pass comes first and frees it first. A kept output is not
  stored here: autograd runs backward through the forward pass's nodes, so the node holds it and
  frees it slice by slice. A second backward pass recomputes it. Either way gradients are the same
  bits.

The recomputation can also start communication for the backward pass: keys for a full layer's
attention arrive from other processes while its experts run backward (`begin_ahead`).

    checkpoint_layers(model, keep_attention=True, keep_experts=4)

A recomputation uses the settings of its forward pass (`settings.py`). On a GPU it runs in an
autograd thread, and on any device the block around the forward pass may have ended by then.

Each checkpoint covers one decoder layer, as in transformers. `checkpoint_contexts`, torch's
`context_fn`, requires its non-reentrant checkpointing.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from sparselong.runtime.settings import Settings, current, restoring

T = TypeVar("T")
Attended = tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]
"""out, lse, and the other tensors saved for backward."""
_active = threading.local()
"""The checkpointed layer that a thread is running. It is not a setting: settings reach autograd's
threads, where a recomputation must see its layer but the backward pass must not."""


class _Layer:
    """One checkpointed layer and the results that it keeps, in the order of computation."""

    def __init__(self, keep_attention: bool, keep_experts: bool, freed_outputs: int = 0):
        self.keep_attention, self.keep_experts = keep_attention, keep_experts
        self.freed_outputs = freed_outputs
        self.results: list[Attended] = []
        self.small: list[tuple[torch.Tensor, ...]] = []
        self.begun: list[Any] = []
        self.settings = Settings()
        """The settings of the forward pass."""
        self.position: int | None = None
        """Index of the next result to return; None in the forward pass."""
        self.small_position = 0


class _Pass:
    """The context of a forward pass or recomputation; entered once per recomputation."""

    def __init__(self, layer: _Layer, position: int | None):
        self.layer, self.position = layer, position

    def __enter__(self) -> None:
        if self.position is None:
            self.layer.settings = current()
        self.block = restoring(self.layer.settings)
        self.block.__enter__()
        self.outer = _layer()
        self.layer.position, _active.layer = self.position, self.layer
        self.layer.small_position = 0
        self.layer.begun.clear()  # left over from an interrupted backward pass

    def __exit__(self, *_: object) -> None:
        _active.layer = self.outer
        self.block.__exit__(None, None, None)


def checkpoint_layers(model: Any, keep_attention: bool, keep_experts: int = 0) -> None:
    """Checkpoint a gpt-oss model's layers, and let them keep results for the backward pass.

    Args:
        model: a model of transformers, not PEFT's wrapper.
        keep_attention: whether layers keep full attention's output: see `checkpoint_contexts`.
        keep_experts: how many layers keep the experts' gate_up output, the last ones of the model.
    """
    first = model.config.num_hidden_layers - keep_experts
    model._set_gradient_checkpointing(
        enable=True,
        gradient_checkpointing_func=partial(
            _run_checkpointed,
            keep_attention=keep_attention,
            first_keeping=first,
            keeping=keep_experts,
        ),
    )


def _run_checkpointed(
    call: partial,
    hidden: torch.Tensor,
    *,
    keep_attention: bool,
    first_keeping: int,
    keeping: int,
) -> torch.Tensor:
    """Run a layer; the checkpoint function of transformers' layers.

    Args:
        call: the layer's bound `__call__` with its arguments by name.
        hidden: [batch, tokens, hidden], the layer's input.
        keep_attention: whether to keep full attention's output.
        first_keeping: index of the first layer that keeps its experts' gate_up output.
        keeping: how many layers do.
    """
    layer: Any = call.func.__self__  # pyright: ignore[reportFunctionMemberAccess]
    keep_experts = layer.self_attn.layer_idx >= first_keeping
    freed_outputs = 0 if keep_experts else keeping
    return checkpoint(  # pyright: ignore[reportReturnType]
        call,
        hidden,
        use_reentrant=False,
        preserve_rng_state=False,  # no layer uses random numbers: adapters have no dropout
        context_fn=partial(checkpoint_contexts, keep_attention, keep_experts, freed_outputs),
    )


def checkpoint_contexts(
    keep_attention: bool, keep_experts: bool = False, freed_outputs: int = 0
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of forward pass and recomputation: torch's checkpoint `context_fn`.

    Args:
        keep_attention: whether to keep full attention's out and lse for the recomputation:
            tokens * (2 * heads * head_dim + 4 * heads) bytes a layer in bf16.
        keep_experts: whether to keep the experts' gate_up output and routing for the backward
            pass: tokens * top_k * (4 * inner + 4) bytes a layer in bf16.
        freed_outputs: how many later layers keep theirs, and free it before this layer's backward
            pass.
    """
    layer = _Layer(keep_attention, keep_experts, freed_outputs)
    return _Pass(layer, None), _Pass(layer, 0)


@contextmanager
def recomputing() -> Iterator[None]:
    """Mark a block as a recomputation whose backward pass runs through the block's own nodes."""
    layer, outer = _Layer(False, False), _layer()
    layer.position, _active.layer = 0, layer
    try:
        yield
    finally:
        _active.layer = outer


def _layer() -> _Layer | None:
    return getattr(_active, "layer", None)


def is_checkpointed() -> bool:
    """Return whether this thread runs or recomputes a checkpointed layer."""
    return _layer() is not None


def is_recomputing() -> bool:
    """Return whether this thread recomputes a checkpointed layer for the backward pass."""
    layer = _layer()
    return layer is not None and layer.position is not None


def unused_output(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor of x's shape in place of an output that a recomputation does not need.

    It is NaN, which would reveal any use. Only the first takes memory and a launch.
    """
    return _make_nan(x.dtype, x.device).expand_as(x)


@functools.cache
def _make_nan(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((), math.nan, dtype=dtype, device=device)


def keeps_experts() -> bool:
    """Return whether the experts must keep gate_up's output for their backward pass."""
    layer = _layer()
    return layer is not None and layer.keep_experts and layer.position is None


def freed_outputs() -> int:
    """Return how many experts' outputs are freed between this forward pass and its backward."""
    layer = _layer()
    return 0 if layer is None else layer.freed_outputs


def attend_once(attend: Callable[[], Attended], is_full: bool) -> Attended:
    """Return `attend()`'s (out, lse, saved), kept from the forward pass in a recomputation.

    Detached views are kept, because the returned tensors become part of autograd's graph.

    Args:
        attend: computes the attention.
        is_full: whether the layer has full attention; other attention is always recomputed.
    """
    layer = _layer()
    if layer is None or not (layer.keep_attention and is_full):
        return attend()
    if layer.position is None:
        result = attend()
        layer.results.append(_view(result))
        return result
    layer.position += 1
    return _view(layer.results[layer.position - 1])


def compute_once(compute: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """Return `compute()`'s small tensors, kept from the forward pass in a recomputation.

    A recomputation without a forward pass of its own (`recomputing`) computes them.
    """
    layer = _layer()
    if layer is None:
        return compute()
    if layer.position is None:
        made = compute()
        layer.small.append(tuple(tensor.detach() for tensor in made))
        return made
    layer.small_position += 1
    kept = layer.small[layer.small_position - 1 : layer.small_position]
    return tuple(tensor.detach() for tensor in kept[0]) if kept else compute()


def begin_ahead(begin: Callable[[], T]) -> list[T]:
    """Return a list to which each recomputation appends `begin()` for its backward pass.

    Autograd runs backward through the forward pass's nodes. The forward pass therefore gets the
    same list, still empty, and its backward pass finds there what the recomputation appended.
    Without checkpointing the list stays empty.
    """
    layer = _layer()
    if layer is None:
        return []
    if layer.position is not None:
        layer.begun.append(begin())
    return layer.begun


def _view(result: Attended) -> Attended:
    out, lse, saved = result
    return out.detach(), lse.detach(), saved
