"""Stand-in for the flash-attn package, which only builds on a GPU machine: its two variable-length
functions in plain torch, as version 2.8 documents them. Like the originals, they ignore sinks.

A sequence's queries are aligned with its last keys; windows count keys per side, -1 means all.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch


def installed() -> Any:
    """Make the package importable inside the block."""
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    interface.__dict__["_flash_attn_varlen_forward"] = _varlen_forward
    interface.__dict__["_flash_attn_varlen_backward"] = _varlen_backward
    return mock.patch.dict(
        sys.modules, {"flash_attn": package, "flash_attn.flash_attn_interface": interface}
    )


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
