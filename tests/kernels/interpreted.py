"""Runs the attention kernels in Triton's interpreter; attention/test_op.py starts it.

Runs in its own process, because the interpreter must be chosen before Triton is imported. Prints
one JSON document: for each case and result the relative L2 error against fp64, NaN if the result
contains NaN. The interpreter has no bf16 products, so fp16 represents the 16-bit types.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import dataclasses
import json

import numpy
import torch

from sparselong.kernels.attention import tiles as attention_tiles
from sparselong.kernels.attention import triton_launch as attention_triton
from sparselong.kernels.attention.mask import AttentionCall, Mask, SavedForward, find_documents
from tests.kernels.interpreter import patch_once
from tests.poisoned import PoisonedTorch
from tests.references.attention import attention_reference


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; the name says what it covers."""

    name: str
    queries: int
    keys: int
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    offset: int = 0
    window: int | None = None
    boundaries: tuple[int, ...] | None = None
    sink: float | None = None
    logits: float = 1.0
    half: bool = False
    layout: str = "token"
    sinks_stride: int = 1
    split: bool | None = None


DOCUMENTS = (0, 1, 2, 9, 41, 42, 70)
CASES = [
    Case("one_token", 1, 1),
    *(Case(f"tail_{n}", n, n) for n in (31, 32, 33, 70)),
    *(Case(f"window_tail_{n}", n, n, window=20, heads=8, kv_heads=1) for n in (31, 33, 70)),
    Case("window_of_one", 40, 40, window=1),
    Case("documents", 70, 70, boundaries=DOCUMENTS),
    Case("documents_in_one_loop", 70, 70, boundaries=DOCUMENTS, split=False),
    Case("last_tile_spans_a_long_and_a_short_document", 70, 70, boundaries=(0, 68, 70)),
    Case("first_block_spans_a_short_and_a_long_document", 70, 70, boundaries=(0, 2, 70)),
    Case("documents_window", 70, 70, window=10, boundaries=DOCUMENTS),
    Case("documents_across_batch_rows", 40, 40, batch=2, boundaries=(0, 5, 6, 55, 80)),
    Case("documents_across_batch_rows_window", 40, 40, batch=2, window=7, boundaries=(0, 55, 80)),
    Case("shard", 20, 70, offset=37),
    Case("shard_window", 20, 70, offset=37, window=30),
    Case("shard_documents", 20, 70, offset=37, boundaries=DOCUMENTS),
    Case("shard_documents_window", 20, 70, offset=37, window=9, boundaries=DOCUMENTS),
    Case("queries_after_all_keys", 10, 20, offset=30),
    Case("window_after_all_keys", 10, 20, offset=30, window=5),
    Case("decode", 1, 70, offset=69),
    Case("split_keys", 1, 600, offset=599),
    Case("split_keys_sinks_high", 1, 530, offset=529, sink=40.0),
    Case("split_keys_sinks_low", 1, 530, offset=529, sink=-40.0),
    Case("split_keys_before_the_last", 3, 600, offset=100, batch=2),
    Case("split_keys_many_queries", 9, 600, offset=591, heads=8, kv_heads=1),
    Case("split_keys_window", 2, 600, offset=598, window=520),
    Case("split_keys_padding", 1, 520, offset=519, batch=2, boundaries=(0, 300, 520, 540, 1040)),
    Case("split_keys_documents_window", 3, 600, offset=597, window=550,
         boundaries=(0, 598, 600)),
    Case("group_of_three", 40, 40, heads=6, kv_heads=2, window=12),
    Case("no_groups", 40, 40, heads=2, kv_heads=2),
    Case("sinks_high", 40, 40, sink=40.0),
    Case("sinks_low", 40, 40, sink=-40.0),
    Case("sinks_strided", 40, 40, sinks_stride=2),
    Case("sinks_expanded", 40, 40, sink=0.7, sinks_stride=0, window=12),
    Case("split_keys_sinks_strided", 1, 530, offset=529, sinks_stride=2),
    Case("large_logits", 40, 40, logits=30.0),
    Case("half", 70, 70, half=True),
    Case("half_window", 70, 70, half=True, window=20),
    Case("head_major", 40, 40, layout="head"),
    Case("dims_not_contiguous", 40, 40, layout="dims", window=12),
]  # fmt: skip


def draw(case: Case) -> list[torch.Tensor]:
    """Return q, k, v, sinks and dout."""
    torch.manual_seed(len(case.name))
    dtype = torch.float16 if case.half else torch.float32

    def tensor(heads: int, tokens: int) -> torch.Tensor:
        if case.layout == "head":
            return torch.randn(case.batch, heads, tokens, 64)
        if case.layout == "dims":
            return torch.randn(case.batch, heads, 64, tokens).mT
        return torch.randn(case.batch, tokens, heads, 64, dtype=dtype).transpose(1, 2)

    sinks = torch.randn(2 * case.heads)
    if case.sink is not None:
        sinks.fill_(case.sink)
    sinks = sinks.as_strided((case.heads,), (case.sinks_stride,))
    q = tensor(case.heads, case.queries) * case.logits
    k, v = tensor(case.kv_heads, case.keys), tensor(case.kv_heads, case.keys)
    return [q, k, v, sinks, tensor(case.heads, case.queries)]


def run(case: Case) -> dict[str, float]:
    """Return relative L2 errors of out, lse and the gradients."""
    q, k, v, sinks, dout = draw(case)
    documents = None
    if case.boundaries is not None:
        documents = find_documents(torch.tensor(case.boundaries), case.batch, case.keys)
    mask = Mask(case.batch, case.queries, case.keys, case.offset, case.window, documents)
    call = AttentionCall(mask, 0.125)
    out, lse, _ = attention_triton.attend(q, k, v, sinks, call)
    grads = attention_triton.attend_backward(dout, SavedForward(q, k, v, sinks, out, lse), call)
    leaves = [t.double().requires_grad_() for t in (q, k, v, sinks)]
    exact, exact_lse = attention_reference(
        *leaves, boundaries=case.boundaries, window=case.window, scale=0.125, offset=case.offset,
    )  # fmt: skip
    wanted = torch.autograd.grad(exact, leaves, dout.double())
    pairs = zip((out, lse, *grads), (exact, exact_lse, *wanted), strict=True)
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    return {
        name: ((got.double() - want).norm() / (want.norm() + 1e-12)).item()
        for name, (got, want) in zip(names, pairs, strict=True)
    }


def main() -> None:
    patch_once()
    attention_triton.torch = PoisonedTorch()
    numpy.seterr(all="ignore")  # exp2 of masked scores overflows; the results are discarded
    default = attention_tiles.FLOAT32
    results = {}
    for case in CASES:
        split = default.split if case.split is None else case.split
        attention_tiles.FLOAT32 = dataclasses.replace(default, split=split)
        results[case.name] = run(case)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
