"""Keeps what attention computed across activation checkpointing.

Checkpointing runs a layer again in the backward pass. All of it is cheap to run again but full
attention, whose cost grows with the square of the length, while what it leaves (out and lse) is as
small as a checkpoint and a half. So a full layer's out and lse are kept in the forward pass and
handed out in the second one; window layers, which cost next to nothing, attend again.

    checkpoint(layer, x, use_reentrant=False, context_fn=keep_attention)

The values are the same bits that a second computation would give. Only torch's non-reentrant
checkpointing has `context_fn`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

Result = tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]

_active = threading.local()  # the second pass runs in autograd's own thread


class _Kept:
    """Results of one checkpointed stretch, in the order in which they were computed."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self.position: int | None = None
        """The next result to hand out; None in the first pass."""


class _Pass:
    """One pass over the stretch; entered again where a graph is gone through again."""

    def __init__(self, kept: _Kept, position: int | None):
        self.kept, self.position = kept, position

    def __enter__(self) -> None:
        self.outer = getattr(_active, "kept", None)
        self.kept.position, _active.kept = self.position, self.kept

    def __exit__(self, *_: object) -> None:
        _active.kept = self.outer


def keep_attention() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` for torch.utils.checkpoint: contexts of the first and of the second pass."""
    kept = _Kept()
    return _Pass(kept, None), _Pass(kept, 0)


def attend_once(attend: Callable[[], Result]) -> Result:
    """`attend()`'s result: kept in a first pass, handed out in a second, plain outside of both.

    Tensors are kept as views of their own: the returned ones become part of autograd's graph.
    """
    kept: _Kept | None = getattr(_active, "kept", None)
    if kept is None:
        return attend()
    if kept.position is None:
        result = attend()
        kept.results.append(_view(result))
        return result
    kept.position += 1
    return _view(kept.results[kept.position - 1])


def _view(result: Result) -> Result:
    out, lse, saved = result
    return out.detach(), lse.detach(), saved
