"""What a checkpointed layer's second pass need not compute.

Activation checkpointing runs a layer once in the forward pass, drops what it saved, and runs it
again in the backward pass to have that back. Plain checkpointing does all of it again. Of a gpt-oss
layer these need not be:

- Full attention, whose cost grows with the square of the length, while what it leaves (out and
  lse) is as small as a checkpoint and a half. `attend_once` keeps these in the first pass and hands
  them out in the second: the same bits. Window layers, which cost next to nothing, attend again.
- Keys that a window layer has from other processes (`parallel/sequence/attention.py`): exchanged
  once, kept by `exchange_once`, which costs next to nothing.
- The experts' output. They come last in a layer, so nothing in the second pass needs it. Their
  backward pass goes from gate_up's output, several checkpoints' worth: it makes that again from
  their input, or finds it where the layer keeps its experts (`kernels/experts/op.py`). That needs
  no list here: autograd goes backward through the first pass's nodes, so the node itself holds it,
  and lets go of it slice by slice. A graph gone through again makes it again.

And what the backward pass will wait for can begin here: keys from other processes are on their way
to a full layer's attention while its experts go backward (`begin_ahead`).

    checkpoint(layer, x, use_reentrant=False, context_fn=partial(checkpoint_contexts, True, False))

A recomputation has the settings of its forward pass (`settings.py`): on a GPU it runs in a thread
of autograd's own, and everywhere it may run when the block around the forward pass has ended.

One decoder layer per checkpoint, as transformers has it. Only torch's non-reentrant checkpointing
has `context_fn`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from sparselong.runtime.settings import Settings, current, restoring

T = TypeVar("T")
Attended = tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]
"""out, lse, and what else the backward pass needs."""
_active = threading.local()
"""The checkpointed layer that a thread is in. No setting: what is kept here changes with the pass,
and a backward pass must not find it in its threads, only a recomputation."""


class _Layer:
    """One checkpointed layer: what it keeps, in the order in which it was computed."""

    def __init__(self, keep_attention: bool, keep_experts: bool):
        self.keep_attention, self.keep_experts = keep_attention, keep_experts
        self.results: list[Attended] = []
        self.exchanged: list[torch.Tensor] = []
        self.begun: list[Any] = []
        self.settings = Settings()
        """Those of the first pass."""
        self.position: int | None = None
        """The next result to hand out; None in the first pass."""
        self.exchange_position = 0


class _Pass:
    """One pass over a layer; entered again where a graph is gone through again."""

    def __init__(self, layer: _Layer, position: int | None):
        self.layer, self.position = layer, position

    def __enter__(self) -> None:
        if self.position is None:
            self.layer.settings = current()
        self.block = restoring(self.layer.settings)
        self.block.__enter__()
        self.outer = _layer()
        self.layer.position, _active.layer = self.position, self.layer
        self.layer.exchange_position = 0
        self.layer.begun.clear()  # of a backward pass that broke off

    def __exit__(self, *_: object) -> None:
        _active.layer = self.outer
        self.block.__exit__(None, None, None)


def checkpoint_contexts(
    keep_attention: bool, keep_experts: bool = False
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` for torch.utils.checkpoint: contexts of the first and of the second pass.

    Args:
        keep_attention: whether full attention's out and lse are kept between the two:
            tokens * (2 * heads * head_dim + 4 * heads) bytes a layer in bf16.
        keep_experts: whether the experts' gate_up output and routing are kept until the backward
            pass: tokens * top_k * (4 * inner + 4) bytes a layer in bf16.
    """
    layer = _Layer(keep_attention, keep_experts)
    return _Pass(layer, None), _Pass(layer, 0)


def _layer() -> _Layer | None:
    return getattr(_active, "layer", None)


def is_checkpointed() -> bool:
    """Whether a checkpointed layer is being run, for the first or the second time."""
    return _layer() is not None


def is_second_pass() -> bool:
    """Whether it is run for the second time, by the backward pass."""
    layer = _layer()
    return layer is not None and layer.position is not None


def keeps_experts() -> bool:
    """Whether the experts' pass is to leave gate_up's output for its backward pass."""
    layer = _layer()
    return layer is not None and layer.keep_experts and layer.position is None


def attend_once(attend: Callable[[], Attended], is_full: bool) -> Attended:
    """`attend()`'s (out, lse, saved): kept in a first pass, handed out in a second.

    Tensors are kept as views of their own: the returned ones become part of autograd's graph.

    Args:
        attend: computes the attention.
        is_full: whether the layer has full attention; another one attends in both passes.
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


def exchange_once(exchange: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`exchange()`'s tensor: kept in a first pass, handed out in a second."""
    layer = _layer()
    if layer is None:
        return exchange()
    if layer.position is None:
        layer.exchanged.append(exchange())
        return layer.exchanged[-1]
    layer.exchange_position += 1
    return layer.exchanged[layer.exchange_position - 1]


def begin_ahead(begin: Callable[[], T]) -> list[T]:
    """What a second pass begins for the backward pass that follows it: `begin()`, last in the list.

    Autograd goes backward through the first pass's nodes, so the first pass is given the list, too,
    and its backward pass finds there what the second one put in. Without checkpointing it is empty.
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
