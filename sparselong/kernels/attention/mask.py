"""Attention masks in the forms that backends need, and the types shared by all backends.

All positions are on the key axis: key j has position j, query i has position `offset + i`. A query
sees the keys of its own document up to itself, and only the last `window` of these. Documents are
given by boundaries on the flattened [batch, keys] axis and never cross a batch row. Padding is a
document of its own and packing is several documents, so neither needs a mask matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class Documents:
    """Packed documents of one [batch, keys] axis, all int32 on the device.

    Attributes:
        boundaries: [n + 1], strictly increasing positions on the flattened axis, including the
            start of every batch row.
        starts: [batch, keys], start of each position's document within its row.
        ends: [batch, keys], one past the end of that document.
        longest: tokens of the longest document.
    """

    boundaries: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    longest: int
    _orders: dict[int, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def order_blocks(self, size: int) -> torch.Tensor:
        """Return int32 [batch, blocks]: blocks of `size` keys, those seen by most queries first."""
        if size not in self._orders:
            first = torch.arange(0, self.ends.shape[1], size, device=self.ends.device)
            last = (first + size - 1).clamp(max=self.ends.shape[1] - 1)
            seen_by = self.ends[:, last] - first
            order = seen_by.argsort(dim=1, descending=True, stable=True)
            self._orders[size] = order.int()
        return self._orders[size]


@dataclass(frozen=True)
class Mask:
    """A causal mask for queries from `offset` on, within documents and a window; in tokens."""

    batch: int
    queries: int
    keys: int
    offset: int
    window: int | None
    documents: Documents | None


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of a backend other than its tensors.

    Attributes:
        mask: which keys each query sees.
        scale: factor of the scores.
        deterministic: whether results must be bitwise reproducible, also in the backward pass.
        needs_dsinks: whether the backward pass computes the sinks' gradient.
    """

    mask: Mask
    scale: float
    deterministic: bool = False
    needs_dsinks: bool = True


class SavedForward(NamedTuple):
    """Tensors saved for backward: the inputs and results of the forward pass."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    kept: tuple[torch.Tensor, ...] = ()


Attended = tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]
"""(out, lse, other tensors that the backward pass needs)."""
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""(dq, dk, dv, dsinks); dsinks is fp32, or None where it is not needed."""

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def find_documents(cu_seqlens: torch.Tensor, batch: int, keys: int) -> Documents:
    """Return the documents of `cu_seqlens`, int32 or int64 [n + 1], from 0 to batch * keys.

    Reading the boundaries is a host synchronization, and every layer of a model needs the same
    documents. They are therefore cached until the tensor is written to or freed. Tensors made under
    `torch.inference_mode` do not track writes, so their documents are never cached.

    Raises:
        ValueError: `cu_seqlens` does not start at 0, decreases, or does not end at batch * keys.
    """
    key = None if cu_seqlens.is_inference() else (cu_seqlens._version, batch, keys)
    cached = _known.get(cu_seqlens)
    if key is not None and cached is not None and cached[0] == key:
        return cached[1]
    _check_boundaries(cu_seqlens, batch * keys)
    with torch.no_grad():
        documents = _build(cu_seqlens, batch, keys)
    if key is not None:
        _known[cu_seqlens] = (key, documents)
    return documents


def _check_boundaries(cu_seqlens: torch.Tensor, length: int) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens: shape {list(cu_seqlens.shape)}; allowed: [documents + 1]")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: {cu_seqlens.dtype}; allowed: torch.int32, torch.int64")
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != length:
        raise ValueError(
            f"cu_seqlens: runs from {values[0]} to {values[-1]}; "
            f"allowed: from 0 to batch * keys = {length}"
        )
    if any(later < earlier for earlier, later in zip(values, values[1:], strict=False)):
        raise ValueError("cu_seqlens: decreases; allowed: non-decreasing boundaries")


def _build(cu_seqlens: torch.Tensor, batch: int, keys: int) -> Documents:
    rows = torch.arange(batch + 1, device=cu_seqlens.device) * keys
    boundaries = torch.unique(torch.cat([cu_seqlens.long(), rows]))
    position = torch.arange(batch * keys, device=cu_seqlens.device)
    document = torch.searchsorted(boundaries, position, right=True)
    row_start = (position // keys) * keys
    starts = (boundaries[document - 1] - row_start).int().view(batch, keys)
    ends = (boundaries[document] - row_start).int().view(batch, keys)
    longest = int((boundaries[1:] - boundaries[:-1]).max())
    return Documents(boundaries.int(), starts, ends, longest)


def mark_starts(
    starts: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None
) -> None:
    """Mark the tokens at which a document starts, in place.

    Args:
        starts: bool [batch, keys], written to.
        mask: [batch, keys], non-zero for tokens, 0 for padding; each change starts a document.
        positions: [batch or 1, keys]. A token starts a document unless its position is its
            predecessor's plus one. The positions of padding are ignored.
    """
    real: torch.Tensor | None = None
    if mask is not None:
        is_token = mask.bool()
        starts[:, 1:] |= is_token[:, 1:] != is_token[:, :-1]
        real = is_token[:, 1:]
    if positions is not None:
        breaks = positions[:, 1:] != positions[:, :-1] + 1
        starts[:, 1:] |= breaks if real is None else breaks & real
    starts[:, 0] = True


def refuse_gaps(real: torch.Tensor, positions: torch.Tensor | None) -> None:
    """Raise if tokens follow padding in a row, unless their positions start again at 0.

    Args:
        real: bool [batch, keys], True for tokens and False for padding.
        positions: [batch or 1, keys], or None if unknown.

    Raises:
        ValueError: a document would continue after padding.
    """
    again = real[:, 1:] & ~real[:, :-1] & real[:, :-1].cummax(1).values
    if positions is not None:
        again &= positions[:, 1:] != 0
    if again.any():
        raise ValueError(
            "attention_mask: tokens on both sides of padding in one row; allowed: padding at the "
            "left or right, or between documents whose position ids start at 0"
        )
