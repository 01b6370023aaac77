"""Plan one attention layer's exchange of keys from the documents' boundaries.

Rank r's queries are two chunks of c tokens: chunks r and 2P - 1 - r. The queries of a chunk that
begins at s see no key before

    low = max(start of s's document, s - window + 1)        (the earliest over the batch's rows)

and none after the chunk, so their keys are [low, s + c): the whole past in a full layer, a halo of
window - 1 keys in a sliding-window layer, and fewer if a document begins in between. Each rank
sends every other rank exactly those keys of its own two chunks that the other needs. Every rank
plans for all ranks, so sizes are never exchanged.

Received keys arrive in rank order. `assembly` tells how to concatenate own and received keys so
that each chunk's keys are contiguous and sorted by position. All ranges are half-open, in tokens.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sparselong.kernels.attention import AttentionCall, Documents, Mask, find_documents
from sparselong.parallel.sequence.shard import chunks_of

Range = tuple[int, int]


class _Batch(NamedTuple):
    """The flattened, padded batch: its document boundaries and its number of sequences."""

    boundaries: tuple[int, ...]
    rows: int

    @property
    def tokens(self) -> int:
        """Number of tokens of each sequence."""
        return self.boundaries[-1] // self.rows


@dataclass(frozen=True)
class Run:
    """One of a rank's two query chunks, and its attention call.

    Attributes:
        queries: the chunk's range in the rank's tokens.
        keys: the range of its keys in the assembled keys.
        call: the attention call.
    """

    queries: slice
    keys: slice
    call: AttentionCall


@dataclass(frozen=True)
class ExchangePlan:
    """A rank's part in the exchange.

    Attributes:
        sent: for each rank of the group, the ranges of own tokens to send to it.
        received_rows: for each rank of the group, the number of tokens that it sends.
        received: for each rank of the group, the ranges of its tokens in the assembled keys, in
            order of arrival.
        own: pairs (range in the rank's own tokens, range in the assembled keys).
        assembly: the pieces of the assembled keys: (whether own, range in the own or received).
        keys: number of assembled keys.
        places: int32 [keys]: an assembled key's row in the received keys, in order of arrival, or
            the bitwise inverse of its row in the rank's own keys.
        runs: the two query chunks with their attention calls.
    """

    sent: tuple[tuple[Range, ...], ...]
    received_rows: tuple[int, ...]
    received: tuple[tuple[Range, ...], ...]
    own: tuple[tuple[Range, Range], ...]
    assembly: tuple[tuple[bool, Range], ...]
    keys: int
    places: torch.Tensor
    runs: tuple[Run, Run]

    @property
    def sent_rows(self) -> list[int]:
        """Number of tokens sent to each rank of the group."""
        return [sum(last - first for first, last in ranges) for ranges in self.sent]


@functools.lru_cache(maxsize=16)
def plan_exchange(
    boundaries: tuple[int, ...],
    rows: int,
    rank: int,
    size: int,
    window: int | None,
    scale: float,
    deterministic: bool,
    needs_dsinks: bool,
    device: torch.device,
) -> ExchangePlan:
    """Plan one rank's exchange for one kind of layer.

    Args:
        boundaries: document boundaries in the flattened, padded batch, from 0 to rows * tokens,
            including every row's start.
        rows: number of sequences in the batch.
        rank: this rank of the context group.
        size: size of the context group.
        window: maximum number of keys that a query sees, itself included; None: all before it.
        scale: the attention calls' softmax scale.
        deterministic: whether gradients must be the same bits in every run.
        needs_dsinks: whether the sinks need a gradient.
        device: the device of the attention calls.
    """
    batch = _Batch(boundaries, rows)
    chunk = batch.tokens // (2 * size)
    needs = [_needed(batch, r, size, window) for r in range(size)]
    owned = [[(n * chunk, (n + 1) * chunk) for n in chunks_of(r, size)] for r in range(size)]
    merged = _merge(needs[rank])
    places = _Places(merged)
    arriving = [[] if r == rank else _common(owned[r], merged) for r in range(size)]
    received = tuple(tuple(places.find(each) for each in ranges) for ranges in arriving)
    mine = _common(owned[rank], merged)
    own = tuple(zip(_to_local(owned[rank], mine), map(places.find, mine), strict=True))
    masks = [
        _make_mask(batch, queries, keys, window, device)
        for queries, keys in zip(owned[rank], needs[rank], strict=True)
    ]
    calls = [AttentionCall(mask, scale, deterministic, needs_dsinks) for mask in masks]
    return ExchangePlan(
        _list_sent(owned[rank], needs, rank),
        tuple(sum(last - first for first, last in ranges) for ranges in arriving),
        received,
        own,
        _assemble(own, received),
        places.total,
        _place_rows(own, received, places.total).to(device, non_blocking=True),
        _make_runs(chunk, [places.find(need) for need in needs[rank]], calls),
    )


def _list_sent(
    owned: list[Range], needs: list[list[Range]], rank: int
) -> tuple[tuple[Range, ...], ...]:
    """Return `ExchangePlan.sent`: what each other rank needs of this rank's tokens."""
    return tuple(
        () if other == rank else tuple(_to_local(owned, _common(owned, _merge(need))))
        for other, need in enumerate(needs)
    )


def _make_runs(chunk: int, keys: list[Range], calls: list[AttentionCall]) -> tuple[Run, Run]:
    """Return a rank's query chunks of `chunk` tokens, with their ranges of the assembled keys."""
    first, second = (
        Run(slice(n * chunk, (n + 1) * chunk), slice(*seen), call)
        for n, (seen, call) in enumerate(zip(keys, calls, strict=True))
    )
    return first, second


def _needed(batch: _Batch, rank: int, size: int, window: int | None) -> list[Range]:
    """Return the range of keys that each of a rank's two query chunks needs."""
    boundaries, tokens = batch.boundaries, batch.tokens
    chunk = tokens // (2 * size)
    needed = []
    for number in chunks_of(rank, size):
        start = number * chunk
        lows = []
        for row in range(batch.rows):
            place = row * tokens + start
            document = boundaries[bisect_right(boundaries, place) - 1] - row * tokens
            lows.append(document if window is None else max(document, start - window + 1))
        needed.append((min(lows), start + chunk))
    return needed


def _make_mask(
    batch: _Batch, queries: Range, keys: Range, window: int | None, device: torch.device
) -> Mask:
    """Return the mask of a query chunk over the keys [low, end of the chunk)."""
    (start, end), (low, _) = queries, keys
    rows, tokens = batch.rows, batch.tokens
    count = end - low
    inside = {0, rows * count}
    for boundary in batch.boundaries[:-1]:
        row, position = divmod(boundary, tokens)
        if low < position < end:
            inside.add(row * count + position - low)
    inside |= {row * count for row in range(rows)}
    documents = None
    if len(inside) > rows + 1:
        documents = _place(find_documents(torch.tensor(sorted(inside)), rows, count), device)
    if window is not None and window >= count:
        window = None  # it masks nothing
    return Mask(rows, end - start, count, start - low, window, documents)


def _place(found: Documents, device: torch.device) -> Documents:
    """Copy to the device; finding documents on the GPU would need a host synchronization."""
    boundaries, starts, ends = (
        tensor.to(device, non_blocking=True)
        for tensor in (found.boundaries, found.starts, found.ends)
    )
    return Documents(boundaries, starts, ends, found.longest)


class _Places:
    """Index of positions in the assembled keys, which are the merged ranges concatenated."""

    def __init__(self, ranges: list[Range]):
        self.ranges, self.offsets, self.total = ranges, [], 0
        for first, last in ranges:
            self.offsets.append(self.total)
            self.total += last - first

    def find(self, part: Range) -> Range:
        """Return where a part of one of the ranges lies in the assembled keys."""
        for (first, last), offset in zip(self.ranges, self.offsets, strict=True):
            if first <= part[0] and part[1] <= last:
                return part[0] - first + offset, part[1] - first + offset
        raise AssertionError(f"{part} is in none of {self.ranges}")


def _merge(ranges: list[Range]) -> list[Range]:
    """Sort ranges and merge those that touch or overlap."""
    merged: list[Range] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def _common(owned: list[Range], needed: list[Range]) -> list[Range]:
    """Return the sorted intersections of owned and needed ranges."""
    pairs = [(max(a, c), min(b, d)) for a, b in owned for c, d in needed]
    return sorted((first, last) for first, last in pairs if first < last)


def _to_local(owned: list[Range], parts: list[Range]) -> list[Range]:
    """Convert ranges of positions to ranges in the rank's own tokens, its two chunks in order."""
    local, offset = [], 0
    for first, last in owned:
        for a, b in parts:
            if first <= a and b <= last:
                local.append((a - first + offset, b - first + offset))
        offset += last - first
    return local


def _place_rows(
    own: tuple[tuple[Range, Range], ...], received: tuple[tuple[Range, ...], ...], keys: int
) -> torch.Tensor:
    """Return `ExchangePlan.places` on the CPU."""
    rows, offset = torch.zeros(keys, dtype=torch.int32), 0
    for first, last in (place for each in received for place in each):
        rows[first:last] = torch.arange(offset, offset + last - first, dtype=torch.int32)
        offset += last - first
    for (first, last), (begin, end) in own:
        rows[begin:end] = ~torch.arange(first, last, dtype=torch.int32)
    return rows


def _assemble(
    own: tuple[tuple[Range, Range], ...], received: tuple[tuple[Range, ...], ...]
) -> tuple[tuple[bool, Range], ...]:
    """Return `ExchangePlan.assembly`, in the order of the assembled keys."""
    pieces = [(there[0], True, here) for here, there in own]
    offset = 0
    for first, last in (place for places in received for place in places):
        pieces.append((first, False, (offset, offset + last - first)))
        offset += last - first
    return tuple((is_own, piece) for _, is_own, piece in sorted(pieces))
