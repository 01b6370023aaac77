"""Attention on a CPU: plain torch against the definition, the kernels in Triton's interpreter,
argument checks and the choice of backend. tests/gpu covers the compiled kernels."""

import dataclasses
import math

import pytest
import torch

from sparselong.kernels.attention import op as kernels
from sparselong.kernels.attention.choice import MEASURED, describe_choice, rank_backends
from sparselong.kernels.attention.mask import AttentionCall, Mask, find_documents
from sparselong.kernels.attention.op import attention, choose_backend
from sparselong.kernels.attention.torch_backend import attention_torch
from tests.kernels import join_interpreted
from tests.kernels.run_interpreted import run_interpreted
from tests.references.attention import attention_reference

EXACT_LIMITS = {"half": 1e-3, "half_window": 1e-3, "large_logits": 1e-5}


def draw(queries=12, keys=12, batch=1, heads=4, kv_heads=2, head_dim=8, dtype=torch.float64):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, queries, head_dim, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, keys, head_dim, dtype=dtype) for _ in range(2))
    return q, k, v, torch.randn(heads, dtype=dtype)


@pytest.mark.parametrize(
    ("queries", "offset", "window", "boundaries"),
    [
        (12, 0, None, [0, 12, 24]),
        (12, 0, 3, [0, 12, 24]),
        (12, 0, 50, [0, 12, 24]),
        (12, 0, None, [0, 1, 5, 12, 20, 24]),
        (5, 4, 3, [0, 5, 8, 15, 24]),
        (1, 11, None, [0, 3, 24]),
    ],
)
def test_plain_torch_matches_the_definition(queries, offset, window, boundaries):
    """Compare output, lse and every gradient; rows=4 splits the queries into several chunks."""
    tensors = [t.requires_grad_() for t in draw(queries, 12, batch=2)]
    expected, expected_lse = attention_reference(
        *tensors, boundaries=boundaries, window=window, offset=offset
    )
    starts = find_documents(torch.tensor(boundaries), 2, 12).starts
    out, lse = attention_torch(
        *tensors, document=starts, window=window, query_offset=offset, rows=4
    )
    public, public_lse = attention(
        *tensors, cu_seqlens=torch.tensor(boundaries), window=window, query_offset=offset
    )
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, tensors, upstream)
    for got, got_lse in ((out, lse), (public, public_lse)):
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(got_lse, expected_lse)
        grads = torch.autograd.grad(got, tensors, upstream)
        torch.testing.assert_close(grads, wanted)


def test_the_definition_by_hand():
    """Two queries and keys with head_dim 1; the sink takes weight but adds no value."""
    q, k = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1), torch.tensor([0.5, -1.0]).view(1, 1, 2, 1)
    v, sinks = torch.tensor([3.0, 5.0]).view(1, 1, 2, 1), torch.tensor([0.25])
    out, lse = attention_reference(q, k, v, sinks, scale=2.0)
    first = math.exp(1.0) + math.exp(0.25)
    second = math.exp(2.0) + math.exp(-4.0) + math.exp(0.25)
    wanted = [3 * math.exp(1.0) / first, (3 * math.exp(2.0) + 5 * math.exp(-4.0)) / second]
    assert out.flatten().tolist() == pytest.approx(wanted)
    assert lse.flatten().tolist() == pytest.approx([math.log(first), math.log(second)])
    apart, _ = attention_reference(q, k, v, sinks, scale=2.0, boundaries=[0, 1, 2])
    alone = 5 * math.exp(-4.0) / (math.exp(-4.0) + math.exp(0.25))
    assert apart.flatten().tolist() == pytest.approx([wanted[0], alone])
    near, _ = attention_reference(q, k, v, sinks, scale=2.0, window=1)
    assert torch.equal(near, apart)


@pytest.fixture(scope="module")
def interpreted(forked_python) -> dict[str, dict[str, float]]:
    """Return the kernels' errors in Triton's interpreter, by case and result."""
    return run_interpreted(forked_python, "interpreted")


def test_interpreted_kernels_agree_with_fp64(interpreted):
    """NaN compares false, so an element that no program wrote also fails."""
    assert len(interpreted) >= 30
    for name, errors in interpreted.items():
        limit = EXACT_LIMITS.get(name, 1.5e-6)
        wrong = {key: value for key, value in errors.items() if not value < limit}
        assert not wrong, f"{name}: {wrong}"
    for name in ("half", "half_window"):
        assert interpreted[name]["dsinks"] < 2e-6, "the sinks' gradient is summed in fp32"


def test_documents_are_cached_until_the_boundaries_are_written_to():
    boundaries = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
    first = find_documents(boundaries, 1, 10)
    assert find_documents(boundaries, 1, 10) is first
    assert first.boundaries.tolist() == [0, 3, 10]
    assert first.starts.tolist() == [[0, 0, 0, 3, 3, 3, 3, 3, 3, 3]]
    assert first.ends.tolist() == [[3, 3, 3, 10, 10, 10, 10, 10, 10, 10]]
    assert first.longest == 7
    boundaries[1:3] = 5
    assert find_documents(boundaries, 1, 10).ends[0, 0] == 5
    with pytest.raises(ValueError, match="cu_seqlens: runs from 0 to 10"):
        find_documents(boundaries, 1, 11)


def test_documents_of_inference_tensors_are_not_cached():
    with torch.inference_mode():
        boundaries = torch.tensor([0, 3, 10])
        first = find_documents(boundaries, 1, 10)
        boundaries[1] = 5
    assert first.ends[0, 0] == 3 and find_documents(boundaries, 1, 10).ends[0, 0] == 5


def test_second_derivatives_are_refused(monkeypatch):
    """The kernels have none, so gradients of gradients would silently be incomplete."""
    plain = kernels.load_backend("torch")
    monkeypatch.setattr(kernels, "load_backend", lambda _: plain)
    tensors = [t.requires_grad_() for t in draw()]
    out, _ = kernels._Attention.apply(
        *tensors, AttentionCall(Mask(1, 12, 12, 0, None, None), 0.3), "any"
    )
    (dq,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_blocks_seen_by_most_queries_come_first():
    documents = find_documents(torch.tensor([0, 3, 10, 24]), 2, 12)
    # Row 0: blocks at 0, 4, 8 lie in documents ending at 10, 10, 12; row 1 is one document.
    assert documents.order_blocks(4).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert find_documents(torch.tensor([0, 2, 12]), 1, 12).order_blocks(2).tolist() == [
        [1, 2, 3, 4, 0, 5]
    ]
    assert documents.order_blocks(4) is documents.order_blocks(4)


def test_documents_stop_at_batch_rows():
    documents = find_documents(torch.tensor([0, 4, 8]), 2, 4)
    across = find_documents(torch.tensor([0, 8]), 2, 4)
    assert torch.equal(documents.starts, across.starts)
    assert across.ends.tolist() == [[4] * 4] * 2


BAD = [
    ({"window": 0}, "window: 0; allowed: a positive integer"),
    ({"window": -3}, "window: -3"),
    ({"window": 2.5}, "window: 2.5"),
    ({"window": True}, "window: True"),
    ({"scale": "8"}, "scale: '8'; allowed: a positive number"),
    ({"query_offset": True}, "query_offset: True"),
    ({"cu_seqlens": [0, 12]}, "cu_seqlens: list; allowed: a tensor"),
    ({"scale": 0.0}, "scale: 0.0"),
    ({"scale": float("nan")}, "scale: nan"),
    ({"query_offset": -1}, "query_offset: -1"),
    ({"backend": "flash"}, "backend: 'flash'; allowed: None, triton"),
    ({"backend": "triton"}, "backend: triton with cpu tensors; allowed: torch"),
    ({"backend": "torch_flash"}, "backend: torch_flash with cpu tensors"),
    ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: runs from 0 to 5; allowed: .* = 12"),
    ({"cu_seqlens": torch.tensor([1, 12])}, "cu_seqlens: runs from 1"),
    ({"cu_seqlens": torch.tensor([0, 9, 5, 12])}, "cu_seqlens: decreases"),
    ({"cu_seqlens": torch.tensor([[0, 12]])}, r"cu_seqlens: shape \[1, 2\]"),
    ({"cu_seqlens": torch.tensor([0.0, 12.0])}, "cu_seqlens: torch.float32"),
    ({"cu_seqlens": torch.tensor([0, 12]), "query_offset": 1}, "query_offset: 1 with 12 queries"),
    ({"cu_seqlens": torch.tensor([0, 12], device="meta")}, "cu_seqlens: on meta"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        attention(*draw(), **change)


def test_bad_tensors_are_named():
    q, k, v, sinks = draw()
    for tensors, message in (
        ((q[0], k, v, sinks), r"q: shape \[4, 12, 8\]"),
        ((q[:, :3], k, v, sinks[:3]), "k: 2 heads; allowed: a divisor of q's 3"),
        ((q, k.float(), v, sinks), "k: torch.float32; allowed: one floating type"),
        ((q.long(), k, v, sinks), "q: torch.int64"),
        ((q, k, v[:, :, :5], sinks), "v: shape"),
        ((q, k[..., :4], v[..., :4], sinks), "k: batch 1 and head_dim 4"),
        ((q, k, v, sinks[:2]), r"sinks: torch.float64 \[2\]; allowed: floating \[4\]"),
        ((q, k, v, sinks.long()), "sinks: torch.int64"),
        ((q, k, v, sinks.to("meta")), "sinks: on meta; allowed: q's device, cpu"),
        ((q[:, :, :0], k, v, sinks), "q: shape .* none of them 0"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*tensors)


def test_backend_choice_follows_the_table():
    """Rank the backends without a GPU: ranking needs no tensor on a device."""
    q = torch.zeros(1, 8, 300, 64, dtype=torch.bfloat16)
    assert choose_backend(q, AttentionCall(Mask(1, 300, 300, 0, None, None), 0.125)) == "torch"
    assert rank_backends("sm_90", "full", False, 16384).order[:2] == ("flash_attn_4", "torch_cudnn")
    assert rank_backends("sm_90", "full", False, 2048).order[0] == "torch_cudnn"
    assert rank_backends("sm_90", "window", True, 16384).order[0] == "triton"
    assert "not timed" in describe_choice("sm_86", False, 4096)["full"]
    for rows in MEASURED.values():
        for kind in ("full", "window"):
            for packed in (False, True):
                sizes = [r.up_to_keys for r in rows if (r.kind, r.packed) == (kind, packed)]
                assert sizes == sorted(sizes) and sizes[-1] > 1 << 40


def test_parts_are_joined_with_their_sinks(forked_python):
    """Check the kernel and plain torch on a CPU."""
    found = run_interpreted(forked_python, "join_interpreted")
    for name, case in join_interpreted.CASES.items():
        limit = 1e-3 if case[-1] == torch.float16 else 1e-6
        for out, lse in (found[name], join_interpreted.errors(*case, "cpu")):
            assert out < limit and lse < 1e-6, (name, out, lse)


def test_cudnn_is_chosen_for_recurring_lengths(monkeypatch):
    monkeypatch.setattr(kernels, "architecture_of", lambda _: "sm_90")
    q = torch.zeros(1, 8, 2048, 64, dtype=torch.bfloat16)

    def choice(queries: int, offset: int) -> str:
        call = AttentionCall(Mask(1, queries, queries + offset, offset, None, None), 0.125)
        return choose_backend(q[:, :, :queries], call)

    for offset in (0, 2048, 3 * 2048):  # a sequence, and its shards
        assert choice(2048, offset) == "torch_cudnn"
        with torch.no_grad():  # a prompt
            assert choice(2048, offset) == "triton"
    for queries, offset in ((2048, 1), (2048, 2047), (2047, 0), (64, 640)):  # documents
        assert choice(queries, offset) == "triton"


def test_each_backend_refuses_unsupported_calls():
    from sparselong.kernels.attention import torch_operators as attention_torch
    from sparselong.kernels.attention import triton_launch as attention_triton

    q = torch.zeros(1, 8, 300, 64, dtype=torch.bfloat16)
    plain = AttentionCall(Mask(1, 300, 300, 0, None, None), 0.125)

    def shaped(*sizes) -> AttentionCall:
        return dataclasses.replace(plain, mask=Mask(1, *sizes))

    documents = find_documents(torch.tensor([0, 300]), 1, 300)
    refuse = attention_torch.refuse_cudnn
    assert refuse(q, plain) is None
    assert "window: 9" in str(refuse(q, shaped(300, 300, 0, 9, None)))
    assert "cu_seqlens" in str(refuse(q, shaped(300, 300, 0, None, documents)))
    assert "query_offset: 5" in str(refuse(q, shaped(300, 310, 5, None, None)))
    for queries, offset in ((63, 237), (237, 1), (237, 63)):
        behind = shaped(queries, queries + offset, offset, None, None)
        assert "allowed: 64 or more of both" in str(refuse(q, behind))
    assert refuse(q, shaped(64, 128, 64, None, None)) is None
    assert "1 query" in str(refuse(q, shaped(1, 1, 0, None, None)))
    assert "deterministic" in str(refuse(q, dataclasses.replace(plain, deterministic=True)))
    assert "float32" in str(refuse(q.float(), plain))
    past = shaped(300, 300, 5, None, None)
    assert "query_offset: 5" in str(attention_torch.refuse_flash(q, past))
    assert attention_triton.refuse(q, dataclasses.replace(past, deterministic=True)) is None
    assert "head_dim: 32" in str(attention_triton.refuse(q[..., :32], plain))
    assert "float64" in str(attention_triton.refuse(q.double(), plain))


def test_plain_torch_computes_in_fp32_under_autocast():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 40, 16, requires_grad=True) for heads in (4, 2, 2))
    sinks = torch.randn(4, requires_grad=True)

    def run(autocast: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, lse = attention_torch(q, k, v, sinks, window=9)
        return [out, lse, *torch.autograd.grad(out.square().sum(), (q, k, v, sinks))]

    for mine, exact in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-6, atol=1e-6)
