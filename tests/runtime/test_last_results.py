"""Results are cached for identical, unmodified tensors, as long as the tensors live."""

import gc
import weakref

import torch

from sparselong.runtime.last_results import call_once

calls = []


def add(a, b, *rest):
    calls.append(rest)
    return sum(rest) + sum(int(t.sum()) for t in (a, b) if t is not None)


def count(*arguments) -> tuple[int, int]:
    """Return (result, number of calls made)."""
    calls.clear()
    return call_once(add, *arguments), len(calls)


def test_a_repeated_call_runs_once_per_kind_of_layer():
    a = torch.ones(3)
    b = a.clone()
    assert count((a, None), 1) == (4, 1)
    assert count((a, None), 2) == (5, 1)
    assert count((a, None), 1) == (4, 0) and count((a, None), 2) == (5, 0)
    assert count((None, a), 1) == (4, 1)  # in another position
    assert count((b, None), 1) == (4, 1)  # another tensor with equal values
    assert count((a, b), 1) == (7, 1) and count((a, b), 1) == (7, 0)
    assert count((None, None), 1) == (1, 1)


def test_a_tensor_that_was_written_to_counts_as_new():
    a = torch.ones(3)
    assert count((a, None)) == (3, 1)
    a += 1
    assert count((a, None)) == (6, 1) and count((a, None)) == (6, 0)
    with torch.inference_mode():
        c = torch.ones(2)
        assert count((c, None)) == (2, 1) and count((c, None)) == (2, 1)  # writes are not tracked


def test_tensors_are_not_kept_alive():
    a = torch.ones(3)
    count((a, None))
    alive = weakref.ref(a)
    del a
    gc.collect()
    assert alive() is None
    assert count((torch.ones(3) * 2, None)) == (6, 1)
