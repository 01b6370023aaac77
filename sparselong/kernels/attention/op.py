"""Attention with sinks, windows, packed documents and grouped queries; forward and backward.

The maths: query i of head h has scores scale * <q_i, k_j> for the keys j that it sees, and one more
logit without a value, the head's sink s_h. With lse_i the log-sum-exp of all of these,
out_i = sum_j exp(score_ij - lse_i) v_j, and

    delta_i = <dO_i, out_i>                    ds_h = -sum_i exp(s_h - lse_i) delta_i
    dS_ij = P_ij (<dO_i, v_j> - delta_i)       dq = scale dS k,  dk = scale dS^T q,  dv = P^T dO

`mask.py` defines which keys query i, at position `query_offset + i`, sees. Saved for backward: q,
k, v, sinks, out and lse; nothing grows with queries * keys.

There are several backends, all exact: our Triton kernels (`triton_launch.py`), torch's
FlashAttention-2 and cuDNN operators (`torch_operators.py`), the flash-attn and flash-attn-4
packages where they are installed (`flash_attn.py`, `flash_attn_4.py`), and plain torch on a CPU
(`torch_backend.py`). A measured table (`choice.py`) picks one, or the caller names it. A named
backend that cannot take the call raises; there is no fallback. The method is FlashAttention-2's
(Dao, 2023, arXiv:2307.08691) and online softmax's (Milakov and Gimelshein, 2018); the code is ours,
under this repository's licence. Not supported: dropout, attention biases, head dimensions other
than 64 on a GPU, gradients through lse, and second derivatives (refused).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from sparselong.kernels.attention.choice import (
    BACKENDS,
    NOT_CHOSEN_DETERMINISTIC,
    rank_backends,
)
from sparselong.kernels.attention.mask import (
    Attended,
    AttentionCall,
    Gradients,
    Mask,
    SavedForward,
    find_documents,
)
from sparselong.kernels.attention.torch_backend import attend_call
from sparselong.kernels.gpu import architecture_of
from sparselong.runtime import attend_once, current

HEAD_DIM = 64
ROUND_TOKENS = 256
"""Lengths expected to recur are multiples of it, as powers of two and their shards are."""
FEWEST_QUERIES = 256
"""Fewest queries for which FlashAttention-4 is chosen: below 129 it compiles other kernels."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    query_offset: int = 0,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse); gradients flow to q, k, v and sinks from out, not from lse.

    Under `runtime.using(deterministic=True)`, a FlashAttention backward pass takes its slower
    deterministic form. "torch_cudnn", which has none, and "flash_attn_4" are then not chosen.
    Errors against fp64 are at most twice those of torch's FlashAttention-2 (tests/gpu).

    Args:
        q: [batch, heads, queries, 64], bf16, fp16 or fp32 (fp64 with "torch"). Read by stride:
            a transposed view of [batch, queries, heads, 64] costs no copy.
        k: [batch, kv_heads, keys, 64], q's dtype; head h reads KV head h // (heads / kv_heads).
        v: like k.
        sinks: [heads], any floating dtype; the gradient has that dtype and is summed in fp32.
        cu_seqlens: int32 or int64 [n + 1], the boundaries of documents on the flattened [batch,
            keys] axis; padding is a document of its own. None: every batch row is one document.
        window: most keys that a query sees, itself included; None: all keys up to itself.
        scale: factor of the scores; None: 1 / sqrt(head_dim).
        query_offset: the position of query 0 on the key axis: 0 in training, keys - queries when
            decoding with a cache. With documents, query_offset + queries must not exceed keys.
        backend: "triton", "torch_flash", "torch_cudnn", "flash_attn", "flash_attn_4" or "torch";
            None: the fastest measured backend that can take the call (`choose_backend`).

    Returns:
        out: [batch, heads, queries, 64] in q's dtype, laid out as [batch, queries, heads, 64].
        lse: [batch, heads, queries] fp32, natural logarithm, with the sink included.

    Raises:
        ValueError: an argument is not as above; the message names it and what is allowed.
    """
    check_arguments(q, k, v, sinks, window, scale, query_offset)
    mask = make_mask(q, k, cu_seqlens, window, query_offset)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    call = AttentionCall(mask, scale, current().deterministic, sinks.requires_grad)
    name = pick_backend(backend, q, call)
    if name == "torch":
        return attend_call(q, k, v, sinks, call)
    return _Attention.apply(q, k, v, sinks, call, name)  # pyright: ignore[reportReturnType]


def pick_backend(backend: str | None, q: torch.Tensor, call: AttentionCall) -> str:
    """Return the named backend or, for None, the one that `choose_backend` returns.

    Raises:
        ValueError: the backend is unknown or cannot take the call, or no backend can.
    """
    return choose_backend(q, call) if backend is None else _require_backend(backend, q, call)


def choose_backend(q: torch.Tensor, call: AttentionCall) -> str:
    """Return the first backend of the measured table that can take the call.

    cuDNN is skipped where its planning cost is not amortized (`plan_pays`), FlashAttention-4 where
    its compilation is not (`compilation_pays`), and both under `deterministic`.

    Raises:
        ValueError: no backend can take the call.
    """
    mask = call.mask
    kind = "full" if mask.window is None else "window"
    row = rank_backends(architecture_of(q.device), kind, mask.documents is not None, mask.keys)
    refusals = []
    for name in row.order:
        if call.deterministic and name in NOT_CHOSEN_DETERMINISTIC:
            continue
        if name == "torch_cudnn" and not plan_pays(mask):
            continue
        if name == "flash_attn_4" and not compilation_pays(mask):
            continue
        refusal = None if name == "torch" else load_backend(name).refuse(q, call)
        if refusal is None:
            return name
        refusals.append(f"{name}: {refusal}")
    raise ValueError("no backend can take this call: " + "; ".join(refusals))


def plan_pays(mask: Mask) -> bool:
    """Return whether this shape will recur, so that cuDNN's planning cost is amortized.

    cuDNN plans every new pair of lengths (0.04 s per pass: benchmarks/attention_first_call.py).
    Sequences of the configured length recur in training, as do their shards, which start at
    multiples of their own length. Chunks of packed documents start anywhere, single conversations
    end anywhere, and without gradients prompts have any length.
    """
    whole = mask.queries % ROUND_TOKENS == 0 and mask.offset % mask.queries == 0
    return whole and torch.is_grad_enabled()


def compilation_pays(mask: Mask) -> bool:
    """Return whether FlashAttention-4's compilation is amortized, which every process repeats.

    It takes 7 s once, for all lengths, and saves 0.3 ms a layer and pass at 4,096 tokens, 4 ms at
    16,384. Training repays that; prompts, and single queries over a cache, do not.
    """
    return mask.queries >= FEWEST_QUERIES and torch.is_grad_enabled()


class Backend(NamedTuple):
    """Entry points of a backend."""

    refuse: Callable[[torch.Tensor, AttentionCall], str | None]
    attend: Callable[..., Attended]
    attend_backward: Callable[[torch.Tensor, SavedForward, AttentionCall], Gradients]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor,
        call: AttentionCall,
        name: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.cuda.device_of(q):
            out, lse, kept = attend_once(
                lambda: load_backend(name).attend(q, k, v, sinks, call),
                is_full=call.mask.window is None,
            )
        ctx.save_for_backward(q, k, v, sinks, out, lse, *kept)
        ctx.call, ctx.backend = call, name
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # else zeros would be made for lse
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor, _: None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, sinks, out, lse, *kept = ctx.saved_tensors
        saved = SavedForward(q, k, v, sinks, out, lse, tuple(kept))
        with torch.cuda.device_of(q):
            *grads, dsinks = load_backend(ctx.backend).attend_backward(dout, saved, ctx.call)
        dsinks = None if dsinks is None else dsinks.to(sinks.dtype)
        return *grads, dsinks, None, None


@functools.cache
def load_backend(name: str) -> Backend:
    """Return the backend's functions, importing its module on first use."""
    if name == "torch":
        from sparselong.kernels.attention import torch_backend as plain

        return Backend(lambda *_: None, plain.attend, plain.attend_backward)
    if name == "triton":
        from sparselong.kernels.attention import triton_launch as ours

        return Backend(ours.refuse, ours.attend, ours.attend_backward)
    if name == "flash_attn":
        from sparselong.kernels.attention import flash_attn as package

        return Backend(package.refuse, package.attend, package.attend_backward)
    if name == "flash_attn_4":
        from sparselong.kernels.attention import flash_attn_4 as newer

        return Backend(newer.refuse, newer.attend, newer.attend_backward)
    from sparselong.kernels.attention import torch_operators as theirs

    if name == "torch_flash":
        return Backend(theirs.refuse_flash, theirs.attend_flash, theirs.attend_flash_backward)
    return Backend(theirs.refuse_cudnn, theirs.attend_cudnn, theirs.attend_cudnn_backward)


def _require_backend(name: str, q: torch.Tensor, call: AttentionCall) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r}; allowed: None, {', '.join(BACKENDS)}")
    if name == "torch":
        return name
    if q.device.type != "cuda":
        raise ValueError(f"backend: {name} with {q.device.type} tensors; allowed: torch")
    if q.shape[-1] != HEAD_DIM:
        raise ValueError(f"head_dim: {q.shape[-1]}; allowed with {name}: {HEAD_DIM}")
    refusal = load_backend(name).refuse(q, call)
    if refusal is not None:
        raise ValueError(f"{refusal} with backend {name}")
    return name


def check_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    window: int | None,
    scale: float | None,
    query_offset: int,
) -> None:
    """Raise ValueError unless the arguments are as `attention` describes them."""
    _check_tensors(q, k, v, sinks)
    _check_numbers(window, scale, query_offset)


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4 or 0 in tensor.shape:
            raise ValueError(
                f"{name}: shape {list(tensor.shape)}; "
                "allowed: [batch, heads, tokens, head_dim], none of them 0"
            )
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            raise ValueError(f"{name}: {tensor.dtype}; allowed: one floating type for q, k and v")
    if v.shape != k.shape:
        raise ValueError(f"v: shape {list(v.shape)}; allowed: k's, {list(k.shape)}")
    if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(
            f"k: batch {k.shape[0]} and head_dim {k.shape[3]}; "
            f"allowed: q's, {q.shape[0]} and {q.shape[3]}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k: {k.shape[1]} heads; allowed: a divisor of q's {q.shape[1]}")
    if sinks.shape != q.shape[1:2] or not sinks.is_floating_point():
        raise ValueError(
            f"sinks: {sinks.dtype} {list(sinks.shape)}; allowed: floating [{q.shape[1]}]"
        )
    for name, tensor in (("k", k), ("v", v), ("sinks", sinks)):
        if tensor.device != q.device:
            raise ValueError(f"{name}: on {tensor.device}; allowed: q's device, {q.device}")
    if q.device.type == "cuda" and q.shape[-1] != HEAD_DIM:
        raise ValueError(f"head_dim: {q.shape[-1]}; allowed on a GPU: {HEAD_DIM}")


def _check_numbers(window: int | None, scale: float | None, query_offset: int) -> None:
    if window is not None and (type(window) is not int or window <= 0):
        raise ValueError(f"window: {window!r}; allowed: a positive integer, or None")
    if scale is not None and not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
        raise ValueError(f"scale: {scale!r}; allowed: a positive number, or None")
    if type(query_offset) is not int or query_offset < 0:
        raise ValueError(f"query_offset: {query_offset!r}; allowed: an integer of at least 0")


def make_mask(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    window: int | None,
    query_offset: int,
) -> Mask:
    """Return the mask of a call; raise ValueError for boundaries that do not fit it."""
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    documents = None
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, torch.Tensor):
            raise ValueError(f"cu_seqlens: {type(cu_seqlens).__name__}; allowed: a tensor, or None")
        if cu_seqlens.device != q.device:
            raise ValueError(f"cu_seqlens: on {cu_seqlens.device}; allowed: q's device, {q.device}")
        if query_offset + queries > keys:
            raise ValueError(
                f"query_offset: {query_offset} with {queries} queries, {keys} keys and documents; "
                f"allowed: at most {keys - queries}"
            )
        documents = find_documents(cu_seqlens, batch, keys)
    if window is not None and window >= query_offset + queries:
        window = None  # it excludes no key
    return Mask(batch, queries, keys, query_offset, window, documents)
