"""Stand-ins for the flash-attn and flash-attn-4 packages, which need a GPU machine.

Of flash-attn, its two variable-length functions in plain torch, as version 2.8 documents them. Like
the originals, they ignore sinks. Of flash-attn-4, the two functions that its autograd functions
call, as in version 4.0.0b36: with sinks in the forward pass, and also without boundaries.

A sequence's queries are aligned with its last keys; windows count keys per side. For flash-attn, -1
means all, for flash-attn-4 None.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch


@contextmanager
def installed() -> Iterator[None]:
    """Make both packages importable inside the block."""
    functions = {
        "flash_attn": {},
        "flash_attn.flash_attn_interface": {
            "_flash_attn_varlen_forward": _varlen_forward,
            "_flash_attn_varlen_backward": _varlen_backward,
        },
        "flash_attn.cute": {},
        "flash_attn.cute.interface": {
            "_flash_attn_fwd": _forward_with_sinks,
            "_flash_attn_bwd": _backward_with_sinks,
        },
    }
    modules = {name: ModuleType(name) for name in functions}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=__file__)
        module.__dict__.update(functions[name])
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


def _varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
    causal, window_size_left=-1, window_size_right=-1,
):  # fmt: skip
    assert dropout_p == 0 and causal and window_size_right in (-1, 0)
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q), dtype=torch.float32)
    limits = (max_seqlen_q, max_seqlen_k)
    for queries, keys in _sequences(cu_seqlens_q, cu_seqlens_k, limits):
        scores = _scores(q[queries], k[keys], softmax_scale, window_size_left)
        lse[:, queries] = scores.logsumexp(2)
        wide = _for_heads(v[keys], q.shape[1])
        out[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(2), wide)
    return out, lse, torch.empty(0), torch.zeros(2, dtype=torch.int64)


def _varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
    alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    assert dropout_p == 0 and causal and window_size_right in (-1, 0)
    assert softcap == 0 and alibi_slopes is None and rng_state.shape == (2,)
    limits, heads = (max_seqlen_q, max_seqlen_k), q.shape[1]
    for queries, keys in _sequences(cu_seqlens_q, cu_seqlens_k, limits):
        scores = _scores(q[queries], k[keys], softmax_scale, window_size_left)
        share = torch.exp(scores - softmax_lse[:, queries, None])
        wide_k, wide_v = (_for_heads(t[keys], heads) for t in (k, v))
        delta = (dout[queries] * out[queries]).sum(2).T[:, :, None]
        wanted = share * (torch.einsum("qhd,khd->hqk", dout[queries], wide_v) - delta)
        wanted *= softmax_scale
        dq[queries] = torch.einsum("hqk,khd->qhd", wanted, wide_k)
        for into, weights, by in ((dk, wanted, q), (dv, share, dout)):
            wide = torch.einsum("hqk,qhd->khd", weights, by[queries])
            into[keys] = wide.unflatten(1, (k.shape[1], -1)).sum(2)
    return torch.empty(0)


def _forward_with_sinks(
    q, k, v, *, learnable_sink, softmax_scale, causal, return_lse, window_size_left=None,
    window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
    max_seqlen_k=None,
):  # fmt: skip
    assert causal and return_lse and window_size_right in (None, 0)
    assert learnable_sink.shape == q.shape[-2:-1]
    packed, bounds = _pack((q, k, v), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    left = -1 if window_size_left is None else window_size_left
    out, lse, *_ = _varlen_forward(*packed, *bounds, 0.0, softmax_scale, causal, left)
    total = torch.logaddexp(lse, learnable_sink.float()[:, None])
    out = out * torch.exp(lse - total).T[..., None].to(out.dtype)
    if cu_seqlens_q is None:
        total = total.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()
    return out.view(q.shape), total, None, None, None


def _backward_with_sinks(
    q, k, v, out, dout, lse, *, softmax_scale, causal, deterministic, window_size_left=None,
    window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
    max_seqlen_k=None,
):  # fmt: skip
    if cu_seqlens_q is None:
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        lse = lse.transpose(0, 1).flatten(1)
    assert lse.is_contiguous() and lse.dtype == torch.float32
    limits = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    packed, bounds = _pack((dout, out, q, k, v), *limits)
    grads = [torch.empty_like(tensor) for tensor in packed[2:]]
    left = -1 if window_size_left is None else window_size_left
    dout, out, *operands = packed
    _varlen_backward(
        dout, *operands, out, lse, *grads, *bounds, 0.0, softmax_scale, causal, left,
        window_size_right or 0, 0.0, None, deterministic, torch.zeros(2),
    )  # fmt: skip
    return tuple(grad.view(like.shape) for grad, like in zip(grads, (q, k, v), strict=True))


def _pack(tensors, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """Return the tensors [tokens, heads, 64] and their boundaries; a batch row is a sequence."""
    if cu_seqlens_q is not None:
        return tensors, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert (cu_seqlens_k, max_seqlen_q, max_seqlen_k) == (None, None, None)
    rows, lengths = len(tensors[0]), (tensors[0].shape[1], tensors[-1].shape[1])
    bounds = (torch.arange(rows + 1, dtype=torch.int32) * length for length in lengths)
    return [tensor.flatten(0, 1) for tensor in tensors], (*bounds, *lengths)


def _sequences(
    cu_q: torch.Tensor, cu_k: torch.Tensor, limits: tuple[int, int]
) -> Iterator[tuple[slice, slice]]:
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k)
    for n in range(len(cu_q) - 1):
        pair = [slice(int(cu[n]), int(cu[n + 1])) for cu in (cu_q, cu_k)]
        assert all(s.stop - s.start <= most for s, most in zip(pair, limits, strict=True))
        yield pair[0], pair[1]


def _for_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor.repeat_interleave(heads // tensor.shape[1], 1)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, left: int) -> torch.Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, _for_heads(k, q.shape[1])) * scale
    place = torch.arange(len(q))[:, None] + len(k) - len(q)
    key = torch.arange(len(k))
    seen = (key <= place) & ((key >= place - left) if left >= 0 else True)
    return scores.masked_fill(~seen, float("-inf"))
