"""Work that recomputation skips: computed once, returned in order, bit-identical."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import GptOssForCausalLM

from sparselong.runtime.recompute import (
    attend_once,
    begin_ahead,
    checkpoint_contexts,
    checkpoint_layers,
    compute_once,
    is_checkpointed,
    is_recomputing,
    keeps_experts,
    recomputing,
    unused_output,
)
from tests.kernels.run_interpreted import run_interpreted

keep = partial(checkpoint_contexts, True)

calls = []


class Toy(torch.autograd.Function):
    """exp, structured like attention in the autograd graph: it saves `attend_once`'s results."""

    @staticmethod
    def forward(ctx, x):
        def attend():
            calls.append(x.shape)
            out = x.exp()
            return out, out.sum(-1), (out + 0,)

        out, lse, saved = attend_once(attend, x.shape[-1] != 3)
        ctx.save_for_backward(out, *saved)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):
        out, extra = ctx.saved_tensors
        assert torch.equal(out, extra)
        return grad * out


def layer(x):
    first, _ = Toy.apply(x.sin())
    second, _ = Toy.apply(first[:, :2].cos())
    return first.sum() * second.sum()


def gradient(x, **arguments):
    calls.clear()
    x = x.clone().requires_grad_()
    checkpoint(layer, x, use_reentrant=False, **arguments).backward()
    return x.grad


def test_kept_attention_runs_once_with_bit_identical_gradients():
    x = torch.randn(3, 4)
    plain = gradient(x)
    assert len(calls) == 4
    kept = gradient(x, context_fn=keep)
    assert [tuple(shape) for shape in calls] == [(3, 4), (3, 2)]
    assert torch.equal(plain, kept)


def test_window_layers_and_layers_without_keeping_attend_twice():
    gradient(torch.randn(2, 3), context_fn=keep)  # [2, 3] is a window layer, [2, 2] is not
    assert [tuple(shape) for shape in calls] == [(2, 3), (2, 2), (2, 3)]
    gradient(torch.randn(3, 4), context_fn=partial(checkpoint_contexts, False))
    assert len(calls) == 4


def test_a_layer_knows_its_current_pass():
    seen = []

    def look(x):
        seen.append((is_checkpointed(), is_recomputing()))
        return x.exp()

    x = torch.randn(3, requires_grad=True)
    look(x)
    checkpoint(look, x, use_reentrant=False, context_fn=keep).sum().backward()
    look(x)
    assert seen == [(False, False), (True, False), (True, True), (False, False)]


def test_backward_finds_what_its_recomputation_began():
    found = []

    class Begins(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.begun = begin_ahead(lambda: len(found))
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            found.append(list(ctx.begun))
            return grad * x.cos()

    x = torch.randn(3, requires_grad=True)
    loss = checkpoint(Begins.apply, x, use_reentrant=False, context_fn=keep).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    Begins.apply(x).sum().backward()
    assert found == [[0], [1], []]


def test_two_layers_of_one_graph_keep_separate_results():
    """The backward pass reaches the later layer first."""
    calls.clear()
    x = torch.randn(3, 4, requires_grad=True)
    a = checkpoint(layer, x, use_reentrant=False, context_fn=keep)
    b = checkpoint(layer, 2 * x, use_reentrant=False, context_fn=keep)
    (a + 3 * b).backward()
    assert len(calls) == 4
    expected = x.detach().clone().requires_grad_()
    (layer(expected) + 3 * layer(2 * expected)).backward()
    assert torch.allclose(x.grad, expected.grad, rtol=1e-6)


def test_a_retained_graph_can_run_backward_again():
    calls.clear()
    x = torch.randn(3, 4, requires_grad=True)
    loss = checkpoint(layer, x, use_reentrant=False, context_fn=keep)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once) and len(calls) == 2


def test_without_checkpointing_nothing_is_kept():
    calls.clear()
    x = torch.randn(3, 4, requires_grad=True)
    layer(x).backward()
    layer(x).backward()
    assert len(calls) == 4


@pytest.mark.parametrize("layers", [0, 1, 3, 4])
def test_the_last_layers_of_a_model_keep_their_experts(untrained_base, layers):
    """Others, and all layers in their recomputation, do not."""
    model = GptOssForCausalLM.from_pretrained(untrained_base).train()
    seen = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda *_, number=number: seen.append((number, is_recomputing(), keeps_experts()))
        )
    checkpoint_layers(model, keep_attention=False, keep_experts=layers)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert seen[:4] == [(n, False, n >= 4 - layers) for n in range(4)]
    assert seen[4:] == [(n, True, False) for n in reversed(range(4))]


class Small(torch.autograd.Function):
    """x times 2, a factor that `compute_once` returns; counts in `calls`."""

    @staticmethod
    def forward(ctx, x):
        def compute():
            calls.append(x.shape)
            return (torch.full_like(x, 2),)

        (factor,) = compute_once(compute)
        ctx.save_for_backward(factor)
        return x * factor

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


def test_small_results_are_taken_from_the_forward_pass_if_it_has_any():
    def twice(x):
        return Small.apply(Small.apply(x).exp()).sum()

    x = torch.randn(3, requires_grad=True)
    calls.clear()
    (expected,) = torch.autograd.grad(twice(x), x)
    assert len(calls) == 2
    kept = checkpoint(twice, x, use_reentrant=False, context_fn=keep)
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(kept, x, retain_graph=True)[0], expected)
    assert len(calls) == 4
    with recomputing():  # as slices of rows are: their forward pass kept nothing
        found = twice(x)
    assert torch.equal(torch.autograd.grad(found, x)[0], expected) and len(calls) == 6


def test_an_unused_output_is_nan_without_memory_of_its_own():
    x = torch.randn(5, 7)
    unused = unused_output(x)
    assert unused.shape == x.shape and unused.dtype == x.dtype and unused.isnan().all()
    assert unused.data_ptr() == unused_output(x[1:]).data_ptr()


@pytest.fixture(scope="module")
def experts(forked_python) -> dict[str, dict]:
    """Return the differences by pass; a layer calls its experts twice, in two slices each."""
    return run_interpreted(forked_python, "interpreted_recompute")


@pytest.mark.parametrize("kind", ["plain", "residual", "biases", "adapters"])
def test_kept_experts_skip_the_gate_up_product_with_equal_gradients(experts, kind):
    found = experts[kind]
    assert found["finite"] and found["equal"] and found["equal_again"]
    n = 2 if kind == "biases" else 4  # a bias gradient is one sum over all tokens
    assert found["made"] == {
        "forward": n, "held": 0, "once": 2 * n, "left": 0, "twice": 3 * n, "left again": 0,
        "sorted": n,  # backward takes the order of the forward pass
    }  # fmt: skip
    # A second backward pass recomputes what the first one freed.
    assert found["kept"] == {
        "forward": n, "held": n, "once": n, "left": 0, "twice": 2 * n, "left again": 0,
        "sorted": n,
    }  # fmt: skip


def test_any_number_of_layers_may_keep_their_experts_with_equal_results(experts):
    """The last layers do, of three with two slices each. Their backward pass is first, and frees
    them layer by layer."""
    found = experts["layers"]
    assert found["finite"] and found["equal"]
    assert found["living"] == [[0, 0, 0, 0], [2, 0, 0, 0], [4, 2, 0, 0], [6, 4, 2, 0]]


def test_weights_are_decoded_once_in_memory_that_later_layers_freed(experts):
    """In each of three layers that does not keep its output while another one does. One layer's
    output of 48 tokens is as large as its weights; 47 are not enough, nor is another backend."""
    assert experts["decoded"] == {
        "equal": True, "counts": [0, 2, 1, 0], "enough": [False, False, False, True]
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "residual", "biases", "adapters"])
def test_gradients_have_the_strides_of_their_tensors(experts, kind):
    """Adapters are views of PEFT's matrices; gradients in another layout would be copied."""
    assert experts[kind]["laid_out_alike"]


def test_the_set_of_trained_tensors_changes_no_gradient(experts):
    """This holds with and without checkpointing; frozen tensors are not written to."""
    assert len(experts["some"]) == 6 and all(experts["some"].values())


@pytest.mark.parametrize("kind", ["plain", "residual", "biases", "adapters"])
def test_an_interrupted_backward_pass_does_not_affect_the_next(experts, kind):
    """After running out of memory in one slice, later slices' results must not be mixed up."""
    assert experts[kind]["equal_after_failure"]
