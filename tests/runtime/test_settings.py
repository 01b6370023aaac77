"""Settings: blocks nest and end; backward passes and recomputations use the right ones."""

import sys
import threading
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparselong.runtime import settings as settings_module
from sparselong.runtime.recompute import checkpoint_contexts
from sparselong.runtime.settings import Settings, current, restoring, using

REENTRANT_DEPTH = 70  # autograd starts new threads for backward passes nested deeper than 60


def in_thread(function):
    """Run the function in a new thread and return its result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_blocks_nest_and_change_only_what_they_name():
    assert current() == Settings() == Settings("auto", False, None, None, None, None)
    with using(attention_backend="triton", deterministic=True) as outer:
        assert current() is outer
        with using(inference_tokens=8):
            assert current() == Settings("triton", True, None, 8)
            with using(deterministic=False):
                assert current() == Settings("triton", False, None, 8)
            with restoring(Settings(inference_tokens=3)):
                assert current() == Settings(inference_tokens=3)
        assert current() is outer
    assert current() == Settings()


def test_an_exception_ends_its_block():
    with using(inference_tokens=2):
        with pytest.raises(InterruptedError), using(inference_tokens=1):
            raise InterruptedError
        assert current().inference_tokens == 2
    assert current().inference_tokens is None


def test_an_invalid_setting_is_refused_and_changes_nothing():
    with pytest.raises(TypeError, match="backend"):
        using(backend="triton")
    with pytest.raises(AttributeError):
        current().deterministic = True  # type: ignore[misc]
    assert current() == Settings()


def test_generators_that_yield_inside_a_block_end_cleanly_in_any_order():
    def generate(tokens):
        with using(inference_tokens=tokens):
            yield current().inference_tokens

    first, second = generate(1), generate(2)
    assert (next(first), next(second)) == (1, 2)
    first.close()
    assert current().inference_tokens == 2  # a suspended generator leaves its settings active
    second.close()
    assert current() == Settings()
    third = generate(3)
    next(third)
    with using(deterministic=True):
        third.close()
        assert current().deterministic
    assert current() == Settings()


def test_a_thread_starts_with_defaults_and_its_settings_are_local():
    def look():
        before = current()
        with using(inference_tokens=5):
            entered.set()
            assert left.wait(20)
            return before, current().inference_tokens

    entered, left = threading.Event(), threading.Event()
    results = []
    with using(attention_backend="triton") as settings:
        thread = threading.Thread(target=lambda: results.append(look()))
        thread.start()
        assert entered.wait(20)
        assert current() is settings
        left.set()
        thread.join()

        def handed_over():
            with restoring(settings):
                return current()

        assert in_thread(handed_over) is settings
    assert results == [(Settings(), 5)]


class _Deep(torch.autograd.Function):
    """Identity whose backward pass runs nested ones and records the settings it finds."""

    @staticmethod
    def forward(ctx, x, depth, seen):
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append((threading.get_ident(), current()))
        if ctx.depth:
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                _Deep.apply(x, ctx.depth - 1, ctx.seen).sum().backward()
        return grad, None, None


def test_autograd_threads_use_the_settings_of_the_calling_thread():
    seen = []
    x = torch.ones(1, requires_grad=True)
    with using(inference_tokens=7):
        loss = _Deep.apply(x, REENTRANT_DEPTH, seen).sum()
        with using(deterministic=True) as settings:
            loss.backward()
    assert len({thread for thread, _ in seen}) > 1
    assert {found for _, found in seen} == {settings}
    seen.clear()
    _Deep.apply(x, REENTRANT_DEPTH, seen).sum().backward()
    assert {found for _, found in seen} == {Settings()}


def test_autograd_does_not_guess_between_threads_with_different_settings():
    entered, left = threading.Event(), threading.Event()

    def hold():
        with using(inference_tokens=5):
            entered.set()
            assert left.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(20)
    try:
        x = torch.ones(1, requires_grad=True)
        with using(inference_tokens=5):  # equal settings: not ambiguous
            _Deep.apply(x, REENTRANT_DEPTH, seen := []).sum().backward()
        assert {found.inference_tokens for _, found in seen} == {5}
        with pytest.raises(RuntimeError, match="different"), using(inference_tokens=6):
            _Deep.apply(x, REENTRANT_DEPTH, []).sum().backward()
        with pytest.raises(RuntimeError, match="different"):  # this thread has the defaults
            _Deep.apply(x, REENTRANT_DEPTH, []).sum().backward()
        assert current() == Settings()  # this thread is none of autograd's
    finally:
        left.set()
        thread.join()


@pytest.mark.parametrize("place", ["here", "in a thread", "in autograd's thread"])
def test_recomputation_uses_the_settings_of_its_forward_pass(place):
    """Two layers with different settings run backward under a third set of settings."""
    seen, threads = [], set()

    def layer(x, name):
        seen.append((name, current()))
        threads.add(threading.get_ident())
        return x.exp()

    x = torch.zeros(2, requires_grad=True)
    run = partial(checkpoint, use_reentrant=False, context_fn=partial(checkpoint_contexts, True))
    with using(inference_tokens=1) as first:
        out = run(layer, x, "first")
    with using(attention_backend="torch") as second:
        loss = run(layer, out, "second").sum()
    assert seen == [("first", first), ("second", second)]
    seen.clear()

    def backward():
        with using(deterministic=True) as around:
            if place == "in autograd's thread":
                x = torch.ones(1, requires_grad=True)
                _Within.apply(x, loss.backward, REENTRANT_DEPTH).backward()
            else:
                loss.backward()
            return current() is around

    assert in_thread(backward) if place == "in a thread" else backward()
    assert seen == [("second", second), ("first", first)]
    assert len(threads) == (1 if place == "here" else 2)
    assert current() == Settings()


class _Within(torch.autograd.Function):
    """Identity whose backward pass nests `depth` levels and then calls `go_backward`."""

    @staticmethod
    def forward(ctx, x, go_backward, depth):
        ctx.go_backward, ctx.depth = go_backward, depth
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.depth:
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                _Within.apply(x, ctx.go_backward, ctx.depth - 1).backward()
        else:
            ctx.go_backward()
        return grad, None, None


def test_plain_checkpointing_uses_the_settings_of_the_backward_pass():
    seen = []

    def layer(x):
        seen.append(current().inference_tokens)
        return x.exp()

    x = torch.zeros(2, requires_grad=True)
    with using(inference_tokens=1):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert seen == [1, 1]


def test_threads_may_begin_while_autograd_asks_all_of_them():
    """The set of threads is read and written under a lock."""
    stop = threading.Event()

    def begin_threads():
        while not stop.is_set():
            in_thread(current)

    beginning = threading.Thread(target=begin_threads)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    beginning.start()
    try:
        for _ in range(3000):
            assert settings_module._settings_of_others() == Settings()
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        beginning.join()
