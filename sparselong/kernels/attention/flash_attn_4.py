"""FlashAttention-4 (the flash-attn-4 package), where it is installed, with its own sinks.

Its CuTe kernels are compiled at run time and need no compiler on the machine. The forward pass adds
each head's sink to the softmax itself, so out and lse already include it and nothing is joined
afterwards. The backward pass uses out and lse only in P = exp(scores - lse) and rowsum(dO * out),
so it needs no sink, and the sink's gradient is that of `torch_operators.py`. A query offset and
documents are passed as to FlashAttention-2: the causal mask is aligned to the last query and key.

Beside its results the backward pass allocates fp32 sums of dq, and of dk and dv for grouped queries
(5 bytes per element of q in gpt-oss's shape; with documents, 128 queries and keys more for each).

A process compiles about 3 s for a forward and 4 s for a backward pass the first time. Lengths,
windows and numbers of heads are arguments of the compiled kernels. Compiled apart are dtypes, query
heads per KV head, the sinks' dtype, full and window layers, calls with documents, more than 256 of
these, at most 128 queries or keys, `deterministic`, and so few queries that one tile holds them.

If a sink exceeds all scores of a query by more than 88, exp overflows in fp32: out and gradients
are then 0, as they are to fp32's precision, but the package's lse is infinite. To fp32's precision
it is the sink, which `attend` puts there.

Written for the version that `install.sh --with-flash-attn-4` installs, because the functions that
it calls are private to the package.
"""

from __future__ import annotations

from typing import Any

import torch

from sparselong.kernels.attention import torch_operators as shared
from sparselong.kernels.attention.installed import refuse_flash_attn_4
from sparselong.kernels.attention.mask import (
    Attended,
    AttentionCall,
    Gradients,
    SavedForward,
)
from sparselong.kernels.gpu import architecture_of

ARCHITECTURE = "sm_90"
_SINK_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuse(q: torch.Tensor, call: AttentionCall) -> str | None:
    """Return why FlashAttention-4 cannot take the call, or None if it can.

    It has no backward pass for sm_8x. On sm_100 this version's hangs with the nvidia-cutlass-dsl
    that it is installed with (Dao-AILab/flash-attention#2689).
    """
    architecture = architecture_of(q.device)
    if architecture != ARCHITECTURE:
        return f"device: {architecture}; allowed: {ARCHITECTURE}"
    return refuse_flash_attn_4() or shared.refuse_flash(q, call)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, call: AttentionCall
) -> Attended:
    """Return (out, lse, no tensors for the backward pass); shapes as in `op.attention`."""
    from flash_attn.cute import interface  # pyright: ignore[reportMissingImports]

    mask = call.mask
    end = mask.offset + mask.queries
    q, k, v = shared.token_major(mask, q, k[:, :, :end], v[:, :, :end])
    sinks = sinks.detach() if sinks.dtype in _SINK_TYPES else sinks.detach().float()
    out, lse, *_ = interface._flash_attn_fwd(
        q, k, v, learnable_sink=sinks, return_lse=True, **_arguments(call)
    )
    if mask.documents is not None:
        lse = lse.view(lse.shape[0], mask.batch, mask.queries).transpose(0, 1)
    lse = torch.where(lse == torch.inf, sinks[:, None].float(), lse)
    return out.view(mask.batch, mask.queries, *out.shape[-2:]).transpose(1, 2), lse, ()


def attend_backward(dout: torch.Tensor, saved: SavedForward, call: AttentionCall) -> Gradients:
    """Return the gradients; dq, dk and dv are the package's own."""
    from flash_attn.cute import interface  # pyright: ignore[reportMissingImports]

    q, k, v, _, out, lse, _ = saved
    mask, shape = call.mask, k.shape
    dsinks = shared.sink_gradient(dout, saved) if call.needs_dsinks else None
    end = mask.offset + mask.queries
    q, k, v = shared.token_major(mask, q, k[:, :, :end], v[:, :, :end])
    dout, out = shared.token_major(mask, dout, out)
    if mask.documents is not None:
        lse = lse.transpose(0, 1).reshape(lse.shape[1], -1)
    grads = interface._flash_attn_bwd(
        q, k, v, out, dout, lse.contiguous(), deterministic=call.deterministic, **_arguments(call)
    )
    dq, dk, dv = (g.view(mask.batch, -1, *g.shape[-2:]).transpose(1, 2) for g in grads)
    return dq, shared.with_unseen_keys(dk, shape), shared.with_unseen_keys(dv, shape), dsinks


def _arguments(call: AttentionCall) -> dict[str, Any]:
    """Return what both functions need beside their tensors."""
    (of_queries, of_keys, longest_queries, longest_keys), window = shared.flash_sizes(call.mask)
    arguments = {"softmax_scale": call.scale, "causal": True, **window}
    if call.mask.documents is None:
        return arguments
    return arguments | {
        "cu_seqlens_q": of_queries,
        "cu_seqlens_k": of_keys,
        "max_seqlen_q": longest_queries,
        "max_seqlen_k": longest_keys,
    }
