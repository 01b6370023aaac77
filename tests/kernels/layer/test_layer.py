"""Norms, rotary embedding and loss on a CPU: the references against transformers and torch, the
interpreted kernels, and argument checks. tests/gpu covers the compiled kernels."""

import pytest
import torch
from transformers.models.gpt_oss import modeling_gpt_oss

from sparselong.kernels.layer.cross_entropy import linear_cross_entropy
from sparselong.kernels.layer.cross_entropy_shard import (
    combine_statistics,
    shard_statistics,
    turn_into_shard_gradients,
)
from sparselong.kernels.layer.norm import add_rms_norm, rms_norm
from sparselong.kernels.layer.rotary import rotate, rotate_back, rotate_projections
from tests.kernels.run_interpreted import run_interpreted
from tests.references.cross_entropy import linear_cross_entropy_reference
from tests.references.norm import add_rms_norm_reference, rms_norm_reference
from tests.references.rotary import rotate_reference

LIMITS = {"norm_half": 3e-4, "softmax_large_True": 2e-5}


@pytest.fixture(scope="module")
def interpreted(forked_python) -> dict[str, list[float]]:
    """Return the kernels' errors in Triton's interpreter, by case."""
    return run_interpreted(forked_python, "interpreted_layer")


def test_interpreted_kernels_agree_with_fp64(interpreted):
    """NaN compares false, so an element that no program wrote also fails."""
    assert len(interpreted) >= 45
    for name, errors in interpreted.items():
        assert errors and all(e < LIMITS.get(name, 3e-7) for e in errors), f"{name}: {errors}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_matches_transformers(dtype):
    torch.manual_seed(0)
    module = modeling_gpt_oss.GptOssRMSNorm(96, eps=1e-5).to(dtype)
    module.weight.data.normal_()
    x, residual = torch.randn(2, 3, 5, 96).to(dtype)
    assert torch.equal(rms_norm(x, module.weight, 1e-5), module(x))
    normed, total = add_rms_norm(x, residual, module.weight, 1e-5)
    assert torch.equal(total, residual + x) and torch.equal(normed, module(total))


def differentiate(function, inputs) -> tuple[torch.Tensor, ...]:
    """Return outputs and every input's gradient under random upstream gradients."""
    torch.manual_seed(1)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, leaves, [torch.randn_like(out) for out in outputs])
    return *outputs, *grads


def test_plain_torch_matches_the_definition_and_its_gradients():
    torch.manual_seed(0)
    x, residual = torch.randn(2, 3, 5, 96, dtype=torch.float64)
    weight = torch.randn(96, dtype=torch.float64)
    q = torch.randn(2, 4, 7, 16, dtype=torch.float64)
    k = torch.randn(2, 2, 7, 16, dtype=torch.float64)
    cos, sin = torch.randn(2, 2, 7, 8, dtype=torch.float64)
    for ours, reference, inputs in (
        (lambda *t: rms_norm(*t, 1e-5), lambda *t: rms_norm_reference(*t, 1e-5), (x, weight)),
        (
            lambda *t: add_rms_norm(*t, 1e-5),
            lambda *t: add_rms_norm_reference(*t, 1e-5),
            (x, residual, weight),
        ),
        (rotate, rotate_reference, (q, k, cos, sin)),
    ):
        torch.testing.assert_close(
            differentiate(ours, inputs), differentiate(reference, inputs), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_matches_transformers(dtype):
    torch.manual_seed(0)
    q, k = torch.randn(2, 7, 4, 16).to(dtype).transpose(1, 2), torch.randn(2, 2, 7, 16).to(dtype)
    cos, sin = torch.randn(2, 2, 7, 8).to(dtype)
    for ours, theirs in zip(
        rotate(q, k, cos, sin), modeling_gpt_oss.apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_rotated_projections_are_the_rotation_and_a_copy():
    torch.manual_seed(0)
    joint = torch.randn(2, 7, 8 * 16)
    q, k, v = (part.view(2, 7, -1, 16).transpose(1, 2) for part in joint.split([64, 32, 32], -1))
    cos, sin = torch.randn(2, 2, 8, 7).mT
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k)]
    rotated = rotate(*leaves, cos, sin)
    results = rotate_projections(q, k, v, cos, sin)
    assert all(map(torch.equal, results, (*rotated, v)))
    assert all(result.transpose(1, 2).is_contiguous() for result in results)
    assert results[2].data_ptr() != v.data_ptr(), "the product's output would be kept"
    upstream = tuple(torch.randn_like(result) for result in results)
    places = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    rotate_back(upstream, cos, sin, places)
    wanted = (*torch.autograd.grad(rotated, leaves, upstream[:2]), upstream[2])
    torch.testing.assert_close(places, wanted)


@pytest.mark.parametrize("chunk", [1, 7, 40, 512])
def test_chunked_loss_matches_torch(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(90, 16, dtype=torch.float64)
    labels = torch.randint(0, 90, (40,))
    labels[::3] = -100
    results = []
    for loss in (
        linear_cross_entropy(hidden, weight, labels, chunk),
        linear_cross_entropy_reference(hidden, weight, labels),
    ):
        results.append((loss, *torch.autograd.grad(loss * 0.3, hidden)))
    torch.testing.assert_close(*results)
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, labels, chunk) == results[0][0]


@pytest.mark.parametrize("widths", [(90,), (30, 30, 30), (1, 0, 88, 1)])
def test_loss_of_shards_matches_torch(widths):
    torch.manual_seed(0)
    logits = (20 * torch.randn(40, 90, dtype=torch.float64)).requires_grad_()
    targets = torch.arange(40) + 50
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    shards = [part.detach().clone() for part in logits.split(widths, 1)]
    firsts = [sum(widths[:n]) for n in range(len(widths))]
    statistics = [
        shard_statistics(shard, targets, first) for shard, first in zip(shards, firsts, strict=True)
    ]
    losses, normalizers = combine_statistics(torch.stack(statistics))
    for shard, first in zip(shards, firsts, strict=True):
        turn_into_shard_gradients(shard, targets, first, normalizers)
    torch.testing.assert_close((losses, torch.cat(shards, 1)), (expected, gradient))


def test_loss_without_labels_is_zero():
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(9, 8), torch.full((4,), -100))
    loss.backward()
    assert loss == 0 and hidden.grad is not None and not hidden.grad.any()


def test_logits_are_computed_for_one_chunk_of_labelled_rows(monkeypatch):
    """No product includes a row without a label or more rows than a chunk."""
    sizes = []
    original = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: sizes.append(len(a)) or original(a, b, **k))
    hidden, labels = torch.randn(50, 8, requires_grad=True), torch.full((50,), -100)
    labels[10:31] = 1
    linear_cross_entropy(hidden, torch.randn(9, 8), labels, 8).backward()
    assert sizes == [8, 8, 8, 8, 5, 5]
    sizes.clear()
    with torch.no_grad():
        linear_cross_entropy(hidden, torch.randn(9, 8), labels, 8)
    assert sizes == [8, 8, 5]


def test_bad_arguments_are_named():
    x, weight = torch.randn(3, 8), torch.randn(8)
    q, k, angles = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 5, 4)
    head, labels = torch.randn(9, 8), torch.zeros(3, dtype=torch.int64)
    for call, message in (
        (lambda: rms_norm(x, weight[:4], 1e-5), r"weight: torch.float32 \[4\]"),
        (lambda: rms_norm(x, weight.to("meta"), 1e-5), "weight: on meta; allowed: x's device, cpu"),
        (lambda: add_rms_norm(x, x[:1], weight, 1e-5), r"residual: \[1, 8\]"),
        (lambda: rotate(q[0], k, angles, angles), r"q: shape \[4, 5, 8\]"),
        (lambda: rotate(q, k.double(), angles, angles), "k: torch.float64"),
        (lambda: rotate(q, k[:, :, :4], angles, angles), r"k: torch.float32 \[1, 2, 4, 8\]"),
        (lambda: rotate(q, k, angles[:, :3], angles), r"cos: torch.float32 \[1, 3, 4\]"),
        (lambda: rotate(q, k, angles, angles.long()), "sin: torch.int64"),
        (lambda: rotate(q, k, angles, angles.to("meta")), "sin: on meta"),
        (lambda: linear_cross_entropy(x[0], head, labels), r"hidden: torch.float32 \[8\]"),
        (lambda: linear_cross_entropy(x, head.half(), labels), "weight: torch.float16"),
        (lambda: linear_cross_entropy(x, head, labels.int()), "labels: torch.int32"),
        (lambda: linear_cross_entropy(x, head, labels + 9), "labels: between 9 and 9"),
        (lambda: linear_cross_entropy(x, head, labels - 1), "labels: between -1 and -1"),
        (lambda: linear_cross_entropy(x, head, labels.to("meta")), "labels: on meta"),
        (lambda: linear_cross_entropy(x, head, labels, 0), "chunk_rows: 0"),
        (lambda: linear_cross_entropy(x, head.requires_grad_(), labels), "a frozen lm_head"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
