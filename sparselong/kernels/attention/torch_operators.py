"""torch's FlashAttention-2 and cuDNN operators, made exact for attention with sinks.

Neither operator supports sinks. With plain attention's output o and natural-log lse, and a head's
sink s,

    out = o * sigmoid(lse - s)        lse' = logaddexp(lse, s)

is exactly attention with the sink. The unmodified backward pass, given out and lse' in place of o
and lse, returns the exact dq, dk and dv, because it uses o and lse only in P = exp(scores - lse')
and rowsum(dO * out). The sink's own gradient is -sum(exp(s - lse') * rowsum(dO * out)).

FlashAttention-2 aligns its causal mask to the last query and the last key, so a query offset is
handled by dropping the keys after the last query. With `deterministic` it runs under torch's
deterministic algorithms. cuDNN's operator has no window, no documents and no deterministic backward
pass, and aligns its mask to the first query and key. Queries at an offset therefore attend twice:
to all keys before the offset, and causally to the keys from it on. The two outputs are weighted by
their shares of the softmax, and the backward pass of each part receives the combined out and lse.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparselong.kernels.attention.join import join
from sparselong.kernels.attention.mask import Attended, AttentionCall, Gradients, Mask, SavedForward
from sparselong.kernels.layout import with_unit_stride

aten = torch.ops.aten
LEAST_BEHIND = 64
"""Fewest queries after an offset, and keys before it, for cuDNN: fewer would not fill one of its
tiles, and it rejects a single key."""
_DSINK_QUERIES = 2048


def refuse_flash(q: torch.Tensor, call: AttentionCall) -> str | None:
    """Return why FlashAttention-2 cannot take the call, or None if it can."""
    mask = call.mask
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q: {q.dtype}; allowed: torch.bfloat16, torch.float16"
    if mask.offset + mask.queries > mask.keys:
        return f"query_offset: {mask.offset}; allowed: at most keys - queries"
    return None


def refuse_cudnn(q: torch.Tensor, call: AttentionCall) -> str | None:
    """Return why cuDNN cannot take the call, or None if it can."""
    mask = call.mask
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q: {q.dtype}; allowed: torch.bfloat16, torch.float16"
    if mask.window is not None:
        return f"window: {mask.window}; allowed: None"
    if mask.documents is not None:
        return "cu_seqlens: given; allowed: None"
    if mask.offset + mask.queries != mask.keys:
        return f"query_offset: {mask.offset}; allowed: keys - queries, {mask.keys - mask.queries}"
    if mask.queries == 1:
        return "q: 1 query; allowed: 2 or more"
    if mask.offset and min(mask.offset, mask.queries) < LEAST_BEHIND:
        return (
            f"q: {mask.queries} queries after an offset of {mask.offset}; "
            f"allowed: {LEAST_BEHIND} or more of both"
        )
    # cuDNN's backward differs between runs regardless: seen on an H200 with torch 2.11.
    if call.deterministic:
        return "deterministic: True; allowed: False"
    return None


def attend_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, call: AttentionCall
) -> Attended:
    """Return (out, lse, tensors for the operator's backward); shapes as in `op.attention`."""
    mask = call.mask
    end = mask.offset + mask.queries
    q, k, v = token_major(mask, q, k[:, :, :end], v[:, :, :end])
    sizes, window = flash_sizes(mask)
    out, lse, *rest = aten._flash_attention_forward(
        q, k, v, *sizes, 0.0, True, False, scale=call.scale, **window
    )
    if mask.documents is not None:
        lse = lse.view(lse.shape[0], mask.batch, mask.queries).transpose(0, 1)
    out = out.view(mask.batch, mask.queries, *out.shape[-2:]).transpose(1, 2)
    return *join([(out, lse)], sinks), (rest[0], rest[1])


def attend_flash_backward(
    dout: torch.Tensor, saved: SavedForward, call: AttentionCall
) -> Gradients:
    """Return the gradients, computed by the operator's own backward."""
    q, k, v, _, out, lse, kept = saved
    mask = call.mask
    dsinks = sink_gradient(dout, saved) if call.needs_dsinks else None
    shape = k.shape
    end = mask.offset + mask.queries
    q, k, v = token_major(mask, q, k[:, :, :end], v[:, :, :end])
    dout, out = token_major(mask, dout, out)
    sizes, window = flash_sizes(mask)
    if mask.documents is not None:
        lse = lse.transpose(0, 1).reshape(lse.shape[1], -1)
    with _determinism(call.deterministic):
        grads = aten._flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            *sizes,
            0.0,
            True,
            *(kept or _unused_states(q.device)),
            scale=call.scale,
            **window,
        )
    dq, dk, dv = (
        g.view(mask.batch, -1, *g.shape[-2:]).transpose(1, 2) for g in grads
    )  # [batch, heads, tokens, head_dim]
    return dq, with_unseen_keys(dk, shape), with_unseen_keys(dv, shape), dsinks


def _unused_states(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return states of the random generator, which the operator takes but without dropout ignores.

    Those of the forward pass are not there if a compiled graph kept only out and lse.
    """
    make = torch.zeros
    return make(2, dtype=torch.uint64, device=device), make((), dtype=torch.uint64, device=device)


def attend_cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, call: AttentionCall
) -> Attended:
    """Return (out, lse, tensors for the operator's backward); shapes as in `op.attention`."""
    q, k, v = with_unit_stride(q, k, v)
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    kept: tuple[torch.Tensor, ...] = ()
    for keys, causal in cudnn_parts(call.mask):
        out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            q, k[:, :, keys], v[:, :, keys], None, True, 0.0, causal, False, scale=call.scale
        )
        parts.append((out, lse.view(q.shape[:3])))
        kept += (seed, offset)
    return *join(parts, sinks), kept


def attend_cudnn_backward(
    dout: torch.Tensor, saved: SavedForward, call: AttentionCall
) -> Gradients:
    """Return the gradients, computed by the operator's own backward."""
    q, k, v, _, out, lse, kept = saved
    mask = call.mask
    dsinks = sink_gradient(dout, saved) if call.needs_dsinks else None
    dout, q, k, v = with_unit_stride(dout, q, k, v)
    dq, pairs = None, []
    unused = torch.zeros(2, dtype=torch.int64, device=q.device).unbind()
    for n, (keys, causal) in enumerate(cudnn_parts(mask)):
        sizes = (None, None, None, mask.queries, keys.stop - keys.start)
        part, *more = aten._scaled_dot_product_cudnn_attention_backward(
            *(dout, q, k[:, :, keys], v[:, :, keys], out, lse[..., None]),
            *(*(kept[2 * n : 2 * n + 2] or unused), *sizes, 0.0, causal),
            scale=call.scale,
        )
        dq = part if dq is None else dq.add_(part)
        pairs.append(more)
    dk, dv = pairs[0] if len(pairs) == 1 else (torch.cat(t, 2) for t in zip(*pairs, strict=True))
    assert dq is not None
    return dq, dk, dv, dsinks


def cudnn_parts(mask: Mask) -> list[tuple[slice, bool]]:
    """Return the keys of each call to the operator, in rising order, and whether it is causal."""
    own = (slice(mask.offset, mask.keys), True)
    return [own] if mask.offset == 0 else [(slice(0, mask.offset), False), own]


def sink_gradient(dout: torch.Tensor, saved: SavedForward) -> torch.Tensor:
    """Return the sinks' gradient, fp32 [heads].

    It is summed over query chunks in a fixed order, to avoid full fp32 copies of dout and out.
    """
    out, lse, sinks = saved.out, saved.lse, saved.sinks
    total = torch.zeros(sinks.shape, dtype=torch.float32, device=dout.device)
    for first in range(0, dout.shape[2], _DSINK_QUERIES):
        chunk = slice(first, first + _DSINK_QUERIES)
        delta = (dout[:, :, chunk].float() * out[:, :, chunk].float()).sum(-1)
        share = torch.exp(sinks.float()[:, None] - lse[:, :, chunk])
        total -= (share * delta).sum((0, 2))
    return total


def token_major(mask: Mask, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return [batch, tokens, heads, head_dim]; with documents, the first two axes are merged."""
    views = with_unit_stride(*(t.transpose(1, 2) for t in tensors))
    if mask.documents is None:
        return views
    return tuple(t.reshape(-1, *t.shape[2:]) for t in views)


def flash_sizes(mask: Mask) -> tuple[tuple, dict[str, int]]:
    """Return (cum_seq_q, cum_seq_k, max_q, max_k) and the window arguments."""
    window = {} if mask.window is None else {"window_size_left": mask.window - 1}
    window |= {"window_size_right": 0} if window else {}
    end = mask.offset + mask.queries
    if mask.documents is None:
        return (None, None, mask.queries, end), window
    boundaries, longest = varlen_boundaries(mask), mask.documents.longest
    # With max_q = 1, the operator assumes that every document has exactly one query.
    return (*boundaries, max(2, min(mask.queries, longest)), min(end, longest)), window


def varlen_boundaries(mask: Mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Return document boundaries over the flattened queries and over the flattened keys.

    Keys after the last query are left out. A document without queries keeps an empty range.
    """
    assert mask.documents is not None
    end = mask.offset + mask.queries
    row = torch.div(mask.documents.boundaries, mask.keys, rounding_mode="floor")
    inside = mask.documents.boundaries - row * mask.keys
    of_queries = row * mask.queries + (inside - mask.offset).clamp(0, mask.queries)
    of_keys = row * end + inside.clamp(max=end)
    return of_queries.int(), of_keys.int()


def with_unseen_keys(grad: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return `grad` padded to `shape` with zeros for the keys after the last query."""
    missing = shape[2] - grad.shape[2]
    return grad if missing == 0 else torch.nn.functional.pad(grad, (0, 0, 0, missing))


@contextmanager
def _determinism(enabled: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if not enabled or (before and not warn_only):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
