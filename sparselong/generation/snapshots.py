"""What a decoder's cache holds, and from where a new prompt can continue it.

A full layer keeps the keys of all positions, so it could continue from any prefix of what it has
read. A sliding layer keeps its last W keys in a ring of W slots: it can continue from its end, or
from one token before (a token attends to W - 1 earlier ones, so the ring has one to spare), or from
any earlier position while nothing has been overwritten, which is up to W tokens.

Chat prompts seldom continue from the end: the format's template drops an answer's analysis in the
next turn, so that turn shares the last prompt, `<|start|>assistant` included, and little or nothing
of what was generated. Therefore all rings are copied (3 MB for 20b) at the end of every prompt, and
also at the end of each of its chunks, from which a prompt continues that was edited in the middle
or interrupted while it was read. A copy serves as long as the full layers hold its tokens: when a
prompt continues from position b, copies that end beyond b are dropped before anything is written.

The result is that of reading the rest in the same chunks. Against a prompt that is read whole it
differs by rounding, as any other split into chunks does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from sparselong.generation.step import LayerCache

MOST_SNAPSHOTS = 8
UNKNOWN = -1
"""Stands for a token that the host has not read; equals none of a prompt."""


class Snapshot(NamedTuple):
    """Rings of all sliding layers after the first `end` of the tokens that the cache holds.

    Attributes:
        end: number of tokens.
        rings: keys and values of each layer in turn, [2 layers, KV heads, slots, head_dim].
    """

    end: int
    rings: torch.Tensor


class History:
    """Tokens that a cache holds, and snapshots of its sliding layers.

    Attributes:
        tokens: the token of each position that the full layers hold, or UNKNOWN.
        snapshots: in ascending order of their ends; each is of the first `end` of `tokens`.
    """

    def __init__(self, caches: list[LayerCache]):
        windows = [cache for cache in caches if cache.is_window]
        self._rings = [ring for cache in windows for ring in (cache.keys, cache.values)]
        self.tokens: list[int] = []
        self.snapshots: list[Snapshot] = []
        self._is_settled = True  # the rings are those of the last token

    def clear(self) -> None:
        """Forget everything, so that the next prompt is read from its start."""
        self.tokens, self.snapshots = [UNKNOWN] * len(self.tokens), []

    def resume(self, prompt: list[int]) -> int:
        """Bring the cache to the longest prefix of a prompt from which it can be read on.

        At least the prompt's last token remains to be read, for its logits.

        Returns:
            The length of the prefix.
        """
        limit = min(_count_shared(self.tokens, prompt), len(prompt) - 1)
        begin, chosen = 0, None
        if self._is_settled:
            begin = self._begin(len(self.tokens), limit)
        for snapshot in self.snapshots:
            if self._begin(snapshot.end, limit) > begin:
                begin, chosen = self._begin(snapshot.end, limit), snapshot
        self.snapshots = [snapshot for snapshot in self.snapshots if snapshot.end <= begin]
        self.tokens, self._is_settled = prompt[:begin], False
        if chosen is not None:
            for ring, kept in zip(self._rings, chosen.rings, strict=True):
                ring.copy_(kept)
        return begin

    def _begin(self, end: int, limit: int) -> int:
        """Return the longest prefix of at most `limit` from which rings after `end` continue."""
        begin = min(end, limit)
        can_go_back = not self._rings or end <= self._rings[0].shape[1]
        return begin if can_go_back or begin >= end - 1 else 0

    @contextmanager
    def writing(self, tokens: list[int]) -> Iterator[None]:
        """Append tokens, whose keys the block writes; if it fails, the rings are not used again."""
        self._is_settled = False
        yield
        self.tokens += tokens
        self._is_settled = True

    def learn(self, token: int) -> bool:
        """Set the last token if it is unknown; return whether it was."""
        is_unknown = self.tokens[-1:] == [UNKNOWN]
        if is_unknown:
            self.tokens[-1] = token
        return is_unknown

    def snapshot(self) -> None:
        """Copy the rings as they are after the last token.

        Beyond MOST_SNAPSHOTS one is dropped: that whose neighbors are nearest to each other, but
        never one of the last two.
        """
        if not self._rings:
            return
        self.snapshots.append(Snapshot(len(self.tokens), torch.stack(self._rings)))
        if len(self.snapshots) > MOST_SNAPSHOTS:
            ends = [0, *(snapshot.end for snapshot in self.snapshots)]
            spans = [after - before for before, after in zip(ends[:-3], ends[2:-1], strict=True)]
            del self.snapshots[spans.index(min(spans))]


def _count_shared(one: list[int], other: list[int]) -> int:
    """Return the length of the longest common prefix."""
    for n, (ours, theirs) in enumerate(zip(one, other, strict=False)):
        if ours != theirs:
            return n
    return min(len(one), len(other))
