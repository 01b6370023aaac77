"""Recomputation that skips work gives the same gradients."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparselong.kernels.attention import triton_launch as attention_triton
from sparselong.kernels.attention.op import attention, load_backend
from sparselong.kernels.experts import op as experts_op
from sparselong.kernels.experts import triton_launch
from sparselong.kernels.experts.op import expert_mlp
from sparselong.runtime.recompute import checkpoint_contexts, checkpoint_layers
from tests.gpu.test_experts import CALL, Case, draw, stack_of
from tests.gpu.test_row_slices import LAYERS, build_model, differentiate

CASE = Case("checkpointed", 300, hidden=288, inner=224)


@pytest.fixture
def counted(monkeypatch):
    """Count the calls of the launchers."""
    load_backend.cache_clear()  # it caches the functions themselves
    calls = {}

    def count(module, name):
        function = getattr(module, name)

        def counting(*args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    count(triton_launch, "run_forward")
    count(triton_launch, "run_gate_up")
    count(triton_launch, "sort_all")
    count(attention_triton, "attend")
    yield calls
    load_backend.cache_clear()


def experts(call, backend="packed"):
    """Return (function of x and routing weights, leaves, dout) with the stacks bound."""
    leaves = [call[name].detach().requires_grad_() for name in ("x", "routing_weights")]
    stack = stack_of(call)

    def layer(x, weights):
        return expert_mlp(x, call["expert_indices"], weights, stack, backend=backend)

    return layer, leaves, call["dout"]


def gradients(layer, leaves, dout, **arguments):
    out = checkpoint(layer, *leaves, use_reentrant=False, **arguments) if arguments else None
    out = layer(*leaves) if out is None else out
    return [out, *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("slice_tokens", [1000, 300, 77])
def test_experts_are_not_recomputed_and_gradients_are_the_same(slice_tokens, counted, monkeypatch):
    monkeypatch.setattr(experts_op, "SLICE_TOKENS", slice_tokens)
    run = experts(draw(CASE))
    plain = gradients(*run)
    counted.clear()
    kept = gradients(*run, context_fn=partial(checkpoint_contexts, False))
    slices = -(-300 // slice_tokens)
    assert counted == {"run_forward": slices, "run_gate_up": 2 * slices, "sort_all": slices}
    for got, expected in zip(kept, plain, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["small", "packed", "decode"])
@pytest.mark.parametrize("slice_tokens", [1000, 77])
def test_kept_experts_skip_the_gate_up_product_with_equal_gradients(
    slice_tokens, backend, counted, monkeypatch
):
    """A second backward pass over the same graph recomputes the outputs already freed."""
    monkeypatch.setattr(experts_op, "SLICE_TOKENS", slice_tokens)
    layer, leaves, dout = experts(draw(CASE), backend)
    made = gradients(layer, leaves, dout, context_fn=partial(checkpoint_contexts, False))
    counted.clear()
    contexts = partial(checkpoint_contexts, False, True)
    out = checkpoint(layer, *leaves, use_reentrant=False, context_fn=contexts)
    once = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    slices = -(-300 // slice_tokens)
    assert counted == {"run_forward": slices, "run_gate_up": slices, "sort_all": slices}
    again = torch.autograd.grad(out, leaves, dout)
    assert counted["run_gate_up"] == 2 * slices
    for got in ([out, *once], [out, *again]):
        assert all(map(torch.equal, got, made))


@pytest.mark.parametrize("slice_tokens", [1000, 77])
def test_weights_decoded_once_give_the_same_bits(slice_tokens, monkeypatch):
    monkeypatch.setattr(experts_op, "SLICE_TOKENS", slice_tokens)
    run, decoded, real = experts(draw(CASE), "decode"), [], triton_launch.decode_all
    monkeypatch.setattr(
        triton_launch, "decode_all", lambda *given: decoded.append(given) or real(*given)
    )
    chunks = gradients(*run, context_fn=partial(checkpoint_contexts, False))
    assert not decoded
    once = gradients(*run, context_fn=partial(checkpoint_contexts, False, False, 100))
    assert len(decoded) == 1
    assert all(map(torch.equal, once, chunks))


def test_kept_experts_are_freed_after_their_layers_backward():
    """Run three layers backward one by one: each frees its own, even if the graph is retained."""
    layer, leaves, dout = experts(draw(CASE))
    contexts = partial(checkpoint_contexts, False, True)
    x, weights = leaves
    with torch.no_grad():
        layer(x, weights)  # allocate everything that is cached
    wide = 300 * CASE.top_k * 2 * CASE.inner * 2
    hidden, before = [x], torch.cuda.memory_allocated()
    for _ in range(3):
        own = hidden[-1].detach().requires_grad_()
        hidden += [own, checkpoint(layer, own, weights, use_reentrant=False, context_fn=contexts)]
    held = torch.cuda.memory_allocated() - before
    assert held > 3 * wide
    for left in (2, 1, 0):
        own, out = hidden[2 * left + 1 : 2 * left + 3]
        torch.autograd.grad(out, (own, weights), dout, retain_graph=True)
        held_now = torch.cuda.memory_allocated() - before
        assert held - held_now > (2.5 - left) * wide


@pytest.mark.parametrize("arm", ["masked", "experts"])
def test_a_model_gives_the_same_bits_however_many_layers_keep_their_experts(arm, counted):
    model, expected = build_model(arm), {}
    for layers in range(LAYERS + 1):
        checkpoint_layers(model.get_base_model(), True, layers)  # pyright: ignore[reportCallIssue]
        counted.clear()
        found = differentiate(model)
        assert counted["run_gate_up"] == 2 * LAYERS - layers
        expected = expected or found
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_trained_biases_get_one_sum_over_all_slices(monkeypatch):
    monkeypatch.setattr(experts_op, "SLICE_TOKENS", 77)
    call = draw(CASE)
    names = ("x", "routing_weights", "gate_up_bias", "down_bias")
    leaves = [call[name].detach().requires_grad_() for name in names]

    def layer(*values):
        given = call | dict(zip(names, values, strict=True))
        inputs = (given[name] for name in CALL)
        return expert_mlp(*inputs, stack_of(given), backend="packed")

    plain = gradients(layer, leaves, call["dout"])
    for keep_experts in (False, True):
        contexts = partial(checkpoint_contexts, False, keep_experts)
        kept = gradients(layer, leaves, call["dout"], context_fn=contexts)
        for got, expected in zip(kept, plain, strict=True):
            assert torch.equal(got, expected)


def test_using_a_skipped_output_gives_nan():
    """Under one checkpoint, the second layer's recomputation lacks the first layer's output."""
    layer, leaves, dout = experts(draw(CASE))
    twice = gradients(
        lambda x, w: layer(layer(x, w).tanh(), w), leaves, dout,
        context_fn=partial(checkpoint_contexts, False),
    )  # fmt: skip
    assert torch.isfinite(twice[0]).all() and torch.isnan(twice[1]).all()


@pytest.mark.parametrize(("window", "calls"), [(None, 1), (64, 2)])
def test_full_attention_is_not_recomputed_and_gradients_are_the_same(window, calls, counted):
    torch.manual_seed(0)
    shapes = ((1, 16, 300, 64), (1, 2, 300, 64), (1, 2, 300, 64), (16,))
    leaves = [torch.randn(s, device="cuda").bfloat16().requires_grad_() for s in shapes]
    dout = torch.randn(shapes[0], device="cuda").bfloat16()

    def layer(q, k, v, sinks):
        return attention(q * 2, k, v, sinks, window=window, backend="triton")[0].sin()

    plain = gradients(layer, leaves, dout)
    counted.clear()
    kept = gradients(layer, leaves, dout, context_fn=partial(checkpoint_contexts, True))
    assert counted == {"attend": calls}
    for got, expected in zip(kept, plain, strict=True):
        assert torch.equal(got, expected)
