"""Attention of one shard's queries to the whole sequence's keys; forward and backward.

Full layers process `heads_k_stride` KV heads (a group) at a time. One all-to-all gathers a group's
keys and values (`exchange.py` plans which); the next group's overlaps with this group's attention.
The backward pass gathers them the same way; in a checkpointed layer the first group's exchange
already starts in the recomputation. dK and dV of other ranks' keys are sent back while the next
group is computed. They are sent in the inputs' dtype, which rounds once, and their owner adds them
in fp32 in rank order. So the exchange's sums are the same bits in every run, as are attention's own
gradients with `deterministic`. This is llama3-style context parallelism (Llama 3, arXiv:2407.21783)
with fewer bytes: no rank receives keys that it cannot see.

Sliding-window layers exchange all heads at once, and only the window - 1 keys before each query
chunk. These keys are saved for backward, also across activation checkpointing. For a full layer
`runtime.attend_once` keeps out and lse, and its keys are gathered again.

The softmax of a query is never split: each call of a `kernels.attention` backend sees all of its
keys and its head's sink. So the sink's gradient is that of one GPU, query by query, and the sum
over ranks counts each query once. The code is ours, under this repository's licence.

Shapes: B rows, T tokens of the shard, K assembled keys, G groups of S KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from sparselong.kernels.attention import RunGradients, SavedForward, load_backend, sort_gradients
from sparselong.parallel.collectives import Pending, start_all_to_all
from sparselong.parallel.sequence.exchange import ExchangePlan, Range
from sparselong.runtime import attend_once, begin_ahead, compute_once

KEYS, KEY_GRADIENTS = "keys", "key gradients"
HALO, HALO_GRADIENTS = "halo", "halo gradients"


@dataclass(frozen=True)
class ShardedCall:
    """One layer's attention on one rank.

    Attributes:
        plan: the rank's exchange plan.
        group: the context group.
        stride: KV heads that are exchanged at a time.
        backends: the attention backend for each of the plan's two query chunks.
        is_full: whether the layer has no window.
    """

    plan: ExchangePlan
    group: dist.ProcessGroup
    stride: int
    backends: tuple[str, ...]
    is_full: bool


def attend_to_all(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, job: ShardedCall
) -> torch.Tensor:
    """Return the attention output, with gradients for q, k, v and sinks.

    Args:
        q: [B, heads, T, D], the shard's queries, its two chunks in order.
        k: [B, kv_heads, T, D], the shard's keys, in the same order.
        v: [B, kv_heads, T, D], the shard's values, in the same order.
        sinks: [heads].
        job: how to attend and exchange.

    Returns:
        [B, heads, T, D].

    Raises:
        StageError: another rank is gone, or did not take part in time.
    """
    return _ShardedAttention.apply(q, k, v, sinks, job)  # pyright: ignore[reportReturnType]


class _ShardedAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor,
        job: ShardedCall,
    ) -> torch.Tensor:
        with torch.cuda.device_of(q):
            own = pack(k, v, job.stride)
            halo, ctx.begun = None, []
            if job.is_full:
                ctx.begun = begin_ahead(lambda: start_exchange(own[0], job, KEYS))
            else:
                (halo,) = compute_once(lambda: (start_exchange(own[0], job, HALO).wait(),))
            # `kept` holds one tuple of saved tensors per backend call.
            out, lse, kept = attend_once(lambda: _attend(q, sinks, own, halo, job), job.is_full)
        flat = [tensor for tensors in kept for tensor in tensors]
        ctx.save_for_backward(q, sinks, own, halo, out, lse, *flat)
        ctx.job, ctx.counts = job, [len(tensors) for tensors in kept]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, sinks, own, halo, out, lse, *flat = ctx.saved_tensors
        kept = []
        for count in ctx.counts:
            kept.append(tuple(flat[:count]))
            del flat[:count]
        # q stands in for the keys and values, which are gathered by group; lse is per call.
        done = SavedForward(q, q, q, sinks, out, lse)
        with torch.cuda.device_of(q):
            groups = gather(own, halo, ctx.job, ctx.begun)
            dq, dk, dv, dsinks = _attend_backward(dout, done, kept, own, groups, ctx.job)
        return dq, dk, dv, None if dsinks is None else dsinks.to(sinks.dtype), None


def pack(k: torch.Tensor, v: torch.Tensor, stride: int) -> torch.Tensor:
    """Return [G, T, 2, B, S, D]: keys and values interleaved, tokens first within a group."""
    rows, heads, tokens, dim = k.shape
    # Flattened to three axes for a single kernel launch, as in `_join`.
    both = [t.unflatten(1, (-1, stride)).permute(1, 3, 0, 2, 4).flatten(2) for t in (k, v)]
    return torch.cat(both, 2).view(heads // stride, tokens, 2, rows, stride, dim)


def start_exchange(own: torch.Tensor, job: ShardedCall, tag: str) -> Pending:
    """Send the rows of a group's own [T, 2, B, S, D] that other ranks need; receive theirs."""
    plan = job.plan
    rows = _take(own, [part for parts in plan.sent for part in parts])
    return start_all_to_all(rows, plan.sent_rows, list(plan.received_rows), job.group, tag)


def assemble(own: torch.Tensor, received: torch.Tensor, plan: ExchangePlan) -> torch.Tensor:
    """Return [K, 2, B, S, D]: a group's own and received keys and values, sorted by position."""
    return _join([(own if mine else received)[slice(*part)] for mine, part in plan.assembly])


def gather(
    own: torch.Tensor,
    halo: torch.Tensor | None,
    job: ShardedCall,
    begun: list[Pending] | None = None,
) -> Iterator[torch.Tensor]:
    """Yield each group's assembled keys and values, while the next group's exchange is running.

    Args:
        own: [G, T, 2, B, S, D], the shard's keys and values.
        halo: received rows of a sliding-window layer; None: exchange now.
        job: how to exchange.
        begun: exchanges of the first group that are already running; the last is removed and used.

    Yields:
        [K, 2, B, S, D] for each group.
    """
    if halo is not None:
        yield assemble(own[0], halo, job.plan)
        return
    pending = begun.pop() if begun else start_exchange(own[0], job, KEYS)
    for group in range(len(own)):
        received = pending.wait()
        if group + 1 < len(own):
            pending = start_exchange(own[group + 1], job, KEYS)
        yield assemble(own[group], received, job.plan)


def _attend(
    q: torch.Tensor,
    sinks: torch.Tensor,
    own: torch.Tensor,
    halo: torch.Tensor | None,
    job: ShardedCall,
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Return (out like q, lse [calls, B, heads of a call, tokens of a chunk], saved tensors).

    The backends save tensors for backward per call. Calls are ordered by group, then by query
    chunk.
    """
    out, lses, kept = _empty_token_major(q), [], []
    share = q.shape[1] // len(own)
    for group, keys in enumerate(gather(own, halo, job)):
        heads, parts = slice(group * share, (group + 1) * share), []
        for run, backend in zip(job.plan.runs, job.backends, strict=True):
            k, v = _keys_and_values(keys[run.keys])
            part, lse, more = load_backend(backend).attend(
                q[:, heads, run.queries], k, v, sinks[heads], run.call
            )
            parts.append(part)
            lses.append(lse)
            kept.append(more)
        _join_runs(parts, out[:, heads])
    return out, torch.stack(lses), tuple(kept)


def _attend_backward(
    dout: torch.Tensor,
    done: SavedForward,
    kept: list[tuple[torch.Tensor, ...]],
    own: torch.Tensor,
    groups: Iterator[torch.Tensor],
    job: ShardedCall,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return dq, dk, dv and, if needed, dsinks in fp32."""
    dq = _empty_token_major(done.q)
    dsinks: list[torch.Tensor] = []
    count, tokens, _, rows, stride, dim = own.shape
    dkv = own.new_empty(2, rows, tokens, count * stride, dim)
    share = done.q.shape[1] // count
    saved = zip(done.lse, kept, strict=True)  # by call
    returning: _Return | None = None
    for group, keys in enumerate(groups):
        heads = slice(group * share, (group + 1) * share)
        parts, gradients, of_sinks = [], [], []
        for run, backend in zip(job.plan.runs, job.backends, strict=True):
            at = (slice(None), heads, run.queries)
            k, v = _keys_and_values(keys[run.keys])
            call = SavedForward(done.q[at], k, v, done.sinks[heads], done.out[at], *next(saved))
            dq_run, dk_run, dv_run, of_run = load_backend(backend).attend_backward(
                dout[at], call, run.call
            )
            parts.append(dq_run)
            gradients.append(RunGradients(run.keys.start, dk_run, dv_run))
            of_sinks.append(of_run)
        _join_runs(parts, dq[:, heads])
        if of_sinks[0] is not None:
            dsinks.append(of_sinks[0] + of_sinks[1])
        if returning is not None:
            returning.finish(dkv)
        returning = _Return(group, (gradients[0], gradients[1]), job)
    assert returning is not None
    returning.finish(dkv)
    dk, dv = dkv.transpose(2, 3)
    return dq, dk, dv, torch.cat(dsinks) if dsinks else None


class _Return:
    """The exchange that returns a group's dK and dV to the ranks that own the keys."""

    def __init__(self, group: int, runs: tuple[RunGradients, RunGradients], job: ShardedCall):
        plan = job.plan
        self.group, self.plan = group, plan
        rows, self.own = sort_gradients(runs, plan.places, sum(plan.received_rows))
        tag = KEY_GRADIENTS if job.is_full else HALO_GRADIENTS
        self.pending = start_all_to_all(
            rows, list(plan.received_rows), plan.sent_rows, job.group, tag
        )

    def finish(self, dkv: torch.Tensor) -> None:
        """Add the received gradients to this rank's own, and write the sums into `dkv`.

        Args:
            dkv: [2, B, T, kv_heads, D], dK and dV of all groups.
        """
        received, first = self.pending.wait(), 0
        for parts in self.plan.sent:
            for begin, end in parts:
                last = first + end - begin
                self.own[begin:end] += received[first:last]
                first = last
        stride = self.own.shape[3]
        heads = slice(self.group * stride, (self.group + 1) * stride)
        dkv[..., heads, :] = self.own.permute(1, 2, 0, 3, 4)


def _take(rows: torch.Tensor, ranges: list[Range]) -> torch.Tensor:
    """Return the rows in these ranges, concatenated."""
    return _join([rows[first:last] for first, last in ranges]) if ranges else rows[:0]


def _join(pieces: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate along the first axis; a single piece is not copied."""
    if len(pieces) == 1:
        return pieces[0]
    # Flattened, because with more than four axes torch.cat launches one copy per piece.
    return torch.cat([piece.flatten(1) for piece in pieces]).view(-1, *pieces[0].shape[1:])


def _keys_and_values(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views k, v [B, S, K, D] of [K, 2, B, S, D]."""
    both = keys.permute(1, 2, 3, 0, 4)
    return both[0], both[1]


def _join_runs(parts: list[torch.Tensor], into: torch.Tensor) -> None:
    """Concatenate a group's chunks [B, heads, tokens of a chunk, D] into its heads of `into`."""
    torch.cat([part.transpose(1, 2) for part in parts], 1, out=into.transpose(1, 2))


def _empty_token_major(like: torch.Tensor) -> torch.Tensor:
    rows, heads, tokens, dim = like.shape
    return like.new_empty(rows, tokens, heads, dim).transpose(1, 2)
