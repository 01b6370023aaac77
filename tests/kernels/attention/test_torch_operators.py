"""The sink correction and the boundaries passed to torch's operators, tested with stand-ins.

The stand-ins do on a CPU what the operators document: attention without sinks, a causal mask
aligned bottom-right, a window to the left, and documents given by boundaries. Like the operators,
their backward pass uses only P = exp(scores - lse) and rowsum(dO * O). tests/gpu/test_attention.py
tests the operators themselves.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from sparselong.kernels.attention import torch_operators as backend
from sparselong.kernels.attention.mask import AttentionCall, Mask, SavedForward, find_documents
from tests.references.attention import attention_reference


def scores_of(q, k, scale, left, unmasked=False):
    """Scores [heads, queries, keys] of one document; q and k are [tokens, heads, head_dim]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    distance = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0] - torch.arange(len(k))
    hidden = (distance < 0) | (distance > left)
    return scores if unmasked else scores.masked_fill(hidden, -math.inf)


def split(q, k, cu_q, cu_k):
    """Return query and key slices per document, or per batch row for dense tensors."""
    if cu_q is None:
        return [((b,), (b,)) for b in range(q.shape[0])]
    spans = zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)
    return [((slice(a, b),), (slice(c, d),)) for a, b, c, d in spans]


def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale, **window):
    assert causal and dropout == 0
    assert max_q > 1 or cu_q is None or len(cu_q) == len(q) + 1  # the operator's shortcut
    left = window.get("window_size_left", 1 << 30)
    out = torch.empty_like(q).fill_(math.nan)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]) if cu_q is None else q.shape[1::-1], 9.0)
    for of_q, of_k in split(q, k, cu_q, cu_k):
        assert q[of_q].shape[0] <= max_q and k[of_k].shape[0] <= max_k
        scores = scores_of(q[of_q], k[of_k], scale, left, "unmasked" in window)
        values = v[of_k].repeat_interleave(q.shape[-2] // v.shape[-2], 1)
        out[of_q] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        lse[of_q if cu_q is None else (slice(None), *of_q)] = scores.logsumexp(-1)
    return out, lse, torch.empty(2), torch.empty(0), torch.empty(0)


def backward(
    dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, _, __, *, scale, **window
):
    left = window.get("window_size_left", 1 << 30)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    group = q.shape[-2] // k.shape[-2]
    for of_q, of_k in split(q, k, cu_q, cu_k):
        scores = scores_of(q[of_q], k[of_k], scale, left, "unmasked" in window)
        own = lse[of_q if cu_q is None else (slice(None), *of_q)]
        p = torch.exp(scores - own[..., None])
        wide_k, wide_v = (t[of_k].repeat_interleave(group, 1) for t in (k, v))
        delta = (dout[of_q] * out[of_q]).sum(-1).T[..., None]
        ds = p * (torch.einsum("qhd,khd->hqk", dout[of_q], wide_v) - delta) * scale
        dq[of_q] = torch.einsum("hqk,khd->qhd", ds, wide_k)
        dk[of_k] = torch.einsum("hqk,qhd->khd", ds, q[of_q]).unflatten(1, (-1, group)).sum(2)
        dv[of_k] = torch.einsum("hqk,qhd->khd", p, dout[of_q]).unflatten(1, (-1, group)).sum(2)
    return dq, dk, dv


def cudnn_forward(q, k, v, bias, computes_lse, dropout, causal, debug, *, scale):
    """Heads come first; the mask is aligned top-left and square if causal."""
    assert bias is None and computes_lse and dropout == 0
    assert not causal or q.shape[2] == k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = {} if causal else {"unmasked": True}
    out, lse, *_ = forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False, scale=scale, **mask
    )
    return out.transpose(1, 2), lse[..., None], *(None,) * 4, "seed", causal, None


def cudnn_backward(
    dout, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout, causal, *, scale
):
    assert (seed, offset) == ("seed", causal), "not what the same part's forward pass returned"
    assert (max_q, max_k) == (q.shape[2], k.shape[2])
    dout, q, k, v, out = (t.transpose(1, 2) for t in (dout, q, k, v, out))
    mask = {} if causal else {"unmasked": True}
    grads = backward(
        dout, q, k, v, out, lse[..., 0], None, None, max_q, max_k, 0.0, True, None, None,
        scale=scale, **mask,
    )  # fmt: skip
    return tuple(t.transpose(1, 2) for t in grads)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    operators = SimpleNamespace(
        _flash_attention_forward=forward,
        _flash_attention_backward=backward,
        _scaled_dot_product_cudnn_attention=cudnn_forward,
        _scaled_dot_product_cudnn_attention_backward=cudnn_backward,
    )
    monkeypatch.setattr(backend, "aten", operators)


LAYOUTS = [
    (2, 20, 20, 0, None, None),
    (2, 20, 20, 0, 6, None),
    (1, 8, 30, 22, None, None),
    (1, 8, 30, 10, 6, None),  # keys after the last query: zero gradients
    (1, 20, 20, 0, None, [0, 1, 2, 9, 20]),
    (2, 20, 20, 0, 5, [0, 7, 25, 40]),
    (1, 8, 30, 12, None, [0, 5, 15, 16, 25, 30]),  # documents before, in and after the shard
    (2, 8, 30, 12, 4, [0, 5, 15, 16, 25, 36, 60]),
    (2, 1, 30, 29, None, [0, 12, 30, 60]),  # decoding a padded batch: one document has no query
]


@pytest.mark.parametrize("batch, queries, keys, offset, window, boundaries", LAYOUTS)
def test_output_and_gradients_with_sinks(batch, queries, keys, offset, window, boundaries):
    functions = (backend.attend_flash, backend.attend_flash_backward)
    compare(functions, batch, queries, keys, offset, window, boundaries)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(2, 20, 20), (1, 8, 30), (2, 15, 30)])
def test_cudnn_splits_off_the_keys_before_its_queries(batch, queries, keys):
    functions = (backend.attend_cudnn, backend.attend_cudnn_backward)
    compare(functions, batch, queries, keys, keys - queries)


def compare(functions, batch, queries, keys, offset, window=None, boundaries=None):
    """Compare output, lse and gradients of a backend with the reference."""
    attend, attend_backward = functions
    torch.manual_seed(0)
    q, dout = (torch.randn(batch, 4, queries, 8, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(batch, 2, keys, 8, dtype=torch.float64) for _ in range(2))
    sinks = torch.randn(4, dtype=torch.float64)
    documents = None
    if boundaries is not None:
        documents = find_documents(torch.tensor(boundaries), batch, keys)
    mask = Mask(batch, queries, keys, offset, window, documents)
    leaves = [t.clone().requires_grad_() for t in (q, k, v, sinks)]
    expected, expected_lse = attention_reference(
        *leaves, boundaries=boundaries, window=window, offset=offset
    )
    grads = torch.autograd.grad(expected, leaves, dout)

    call = AttentionCall(mask, 8**-0.5)
    out, lse, kept = attend(q, k, v, sinks, call)
    got = attend_backward(dout, SavedForward(q, k, v, sinks, out, lse, kept), call)
    close = {"rtol": 1e-4, "atol": 1e-5}  # sinks and lse are fp32
    torch.testing.assert_close(out, expected.detach(), **close)
    torch.testing.assert_close(lse.double(), expected_lse.detach(), **close)
    for mine, exact in zip(got, grads, strict=True):
        torch.testing.assert_close(mine.double(), exact, **close)
