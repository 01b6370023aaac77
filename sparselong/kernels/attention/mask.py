"""Which keys a query sees, in the forms that the backends want; and what they hand each other.

All positions are counted on the key axis: key j has position j, query i has position
`offset + i`. A query sees the keys of its own document, up to itself, and of these the last
`window`. Documents are given by boundaries over the flattened [batch, keys] axis and never cross a
batch row, so padding is a document of its own, packing is several, and neither needs a matrix.
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
        boundaries: [n + 1], strictly increasing positions on the flattened axis, the start of every
            batch row among them.
        starts: [batch, keys], where in its row the document of this position begins.
        ends: [batch, keys], one past where it ends.
        longest: tokens of the longest document.
    """

    boundaries: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    longest: int
    _orders: dict[int, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def order_blocks(self, size: int) -> torch.Tensor:
        """int32 [batch, blocks]: blocks of `size` keys, those that most queries see first."""
        if size not in self._orders:
            first = torch.arange(0, self.ends.shape[1], size, device=self.ends.device)
            last = (first + size - 1).clamp(max=self.ends.shape[1] - 1)
            seen_by = self.ends[:, last] - first
            order = seen_by.argsort(dim=1, descending=True, stable=True)
            self._orders[size] = order.int()
        return self._orders[size]


@dataclass(frozen=True)
class Mask:
    """Causal, from `offset` on, inside documents, inside a window. Sizes in tokens."""

    batch: int
    queries: int
    keys: int
    offset: int
    window: int | None
    documents: Documents | None


@dataclass(frozen=True)
class AttentionCall:
    """What a backend is asked for beside the tensors.

    Attributes:
        scale: factor of the scores.
        deterministic: the same bits every time, also in the backward pass.
        needs_dsinks: whether the backward pass computes the sinks' gradient.
    """

    mask: Mask
    scale: float
    deterministic: bool = False
    needs_dsinks: bool = True


class SavedForward(NamedTuple):
    """A forward pass as its backward pass finds it: inputs and what was `Attended`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    kept: tuple[torch.Tensor, ...] = ()


Attended = tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]
"""out, lse, and what else the backward pass needs."""
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""dq, dk, dv, and dsinks in fp32 where needed."""

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def find_documents(cu_seqlens: torch.Tensor, batch: int, keys: int) -> Documents:
    """The documents of `cu_seqlens`, int32 or int64 [n + 1], from 0 to batch * keys.

    Reading the boundaries waits for the device, so the answer is kept as long as the tensor lives
    and is not written to: every layer of a model asks for the same one. (Tensors made under
    `torch.inference_mode` do not say whether they were written to; theirs is found every time.)

    Raises:
        ValueError: `cu_seqlens` does not start at 0, decreases, or does not end at batch * keys.
    """
    asked = None if cu_seqlens.is_inference() else (cu_seqlens._version, batch, keys)
    known = _known.get(cu_seqlens)
    if asked is not None and known is not None and known[0] == asked:
        return known[1]
    _check_boundaries(cu_seqlens, batch * keys)
    with torch.no_grad():
        documents = _build(cu_seqlens, batch, keys)
    if asked is not None:
        _known[cu_seqlens] = (asked, documents)
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
        raise ValueError("cu_seqlens: decreases; allowed: boundaries in rising order")


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
    """Marks in `starts`, bool [batch, keys], the tokens at which a document starts.

    Args:
        mask: [batch, keys], non-zero where a token is: padding begins and ends documents.
        positions: [batch or 1, keys]; a token whose position is not its predecessor's plus one
            starts one. Padding's positions follow no rule and count for nothing.
    """
    real: torch.Tensor | None = None
    if mask is not None:
        padding = mask.bool()
        starts[:, 1:] |= padding[:, 1:] != padding[:, :-1]
        real = padding[:, 1:]
    if positions is not None:
        breaks = positions[:, 1:] != positions[:, :-1] + 1
        starts[:, 1:] |= breaks if real is None else breaks & real
    starts[:, 0] = True


def refuse_gaps(real: torch.Tensor, positions: torch.Tensor | None) -> None:
    """That no tokens go on behind padding: their positions, if known, start anew there.

    Args:
        real: bool [batch, keys], True where a token is.
        positions: [batch or 1, keys].

    Raises:
        ValueError: some do.
    """
    again = real[:, 1:] & ~real[:, :-1] & real[:, :-1].cummax(1).values
    if positions is not None:
        again &= positions[:, 1:] != 0
    if again.any():
        raise ValueError(
            "attention_mask: tokens on both sides of padding in one row; allowed: padding at the "
            "left or right, or between documents whose position ids start at 0"
        )
