"""One layer's experts over the rows of several processes, and over all rows in one process."""

from __future__ import annotations

import functools
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from sparselong.kernels.expert_stack import ExpertStack, PackedWeight
from sparselong.kernels.experts.lora import Adapter, Adapters
from sparselong.kernels.experts.op import expert_mlp
from sparselong.parallel.collectives import count_bytes
from sparselong.parallel.experts import pipeline
from sparselong.parallel.experts.exchange import ShardedExperts
from sparselong.parallel.placement import Placement
from sparselong.runtime.recompute import checkpoint_contexts

HIDDEN, INNER, TOP_K, RANK = 64, 32, 3, 4


@dataclass(frozen=True)
class Layer:
    """A layer and its rows.

    Attributes:
        rows: number of rows of each process.
        experts: number of experts.
        routing: "spread", "one" (all rows use expert 1 and its neighbours) or "last" (the last
            experts only).
        adapted: whether the experts have adapters.
        chunk: most rows of a process in a chunk.
        backward_chunk: the same in the backward pass; None: as in the forward pass.
        checkpointed: whether the layer is recomputed.
        broken: piece to disable, one of `PIECES`.
    """

    rows: tuple[int, ...]
    experts: int = 8
    routing: str = "spread"
    adapted: bool = True
    chunk: int = 4
    backward_chunk: int | None = None
    checkpointed: bool = False
    broken: str | None = None
    dtype: torch.dtype = torch.float64
    device: str = "cpu"


def draw(layer: Layer) -> dict[str, Any]:
    """Return stack, adapters and all rows with routing and the gradient of the outputs."""
    generator = torch.Generator().manual_seed(sum(layer.rows) + layer.experts)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731

    def weight(out: int, inside: int) -> PackedWeight:
        shape = (layer.experts, out, inside // 32)
        return PackedWeight(
            torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8),
            torch.randint(121, 125, shape, generator=generator, dtype=torch.uint8),
            normal(*shape[:2]).to(layer.dtype).to(layer.device),
        )

    def adapter(out: int, inside: int) -> Adapter:
        a, b = normal(layer.experts, RANK, inside), normal(layer.experts, out, RANK)
        return Adapter(*(0.3 * one.to(layer.dtype).to(layer.device) for one in (a, b)), 0.7)

    rows = sum(layer.rows)
    order = torch.rand(rows, layer.experts, generator=generator).argsort(1)[:, :TOP_K]
    fixed = torch.arange(TOP_K) + (1 if layer.routing == "one" else layer.experts - TOP_K)
    sizes = (2 * INNER, HIDDEN), (HIDDEN, INNER)
    stack = ExpertStack(*(weight(*size) for size in sizes))
    stack = ExpertStack(*(PackedWeight(*(t.to(layer.device) for t in weight)) for weight in stack))
    return {
        "stack": stack,
        "adapters": Adapters(*(adapter(*size) for size in sizes)) if layer.adapted else Adapters(),
        "indices": (order if layer.routing == "spread" else fixed.expand(rows, -1)).to(
            layer.device
        ),
        **{
            name: normal(rows, width).to(layer.dtype).to(layer.device)
            for name, width in (("x", HIDDEN), ("weights", TOP_K), ("dout", HIDDEN))
        },
    }


def infer_alone(layer: Layer) -> torch.Tensor:
    """Return the output of one process that holds all experts and rows, without gradients."""
    found = draw(layer)
    with torch.no_grad():
        call = (found[name] for name in ("x", "indices", "weights", "stack", "adapters"))
        return expert_mlp(*call, backend="torch" if layer.device == "cpu" else None)


def run_alone(layer: Layer) -> dict[str, torch.Tensor]:
    """Return output and gradients of one process that holds all experts and rows."""
    found = draw(layer)
    backend = "torch" if layer.device == "cpu" else None
    return _differentiate(layer, found, partial(expert_mlp, backend=backend))


def _differentiate(layer: Layer, found: dict[str, Any], run: Any) -> dict[str, torch.Tensor]:
    leaves = {name: found[name].detach().clone().requires_grad_() for name in ("x", "weights")}
    factors = {}
    adapters = []
    for name, adapter in zip(Adapters._fields, found["adapters"], strict=True):
        if adapter is not None:
            a, b = (t.detach().clone().requires_grad_() for t in adapter[:2])
            factors |= {f"{name}.a": a, f"{name}.b": b}
            adapter = Adapter(a, b, adapter.scaling)
        adapters.append(adapter)

    def compute(x: torch.Tensor) -> torch.Tensor:
        inputs = (x, found["indices"], leaves["weights"], found["stack"], Adapters(*adapters))
        return run(*inputs)

    if layer.checkpointed:
        contexts = partial(checkpoint_contexts, False)
        out = checkpoint(compute, leaves["x"], use_reentrant=False, context_fn=contexts)
    else:
        out = compute(leaves["x"])
    out.backward(found["dout"])
    grads = {
        f"d {name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in (leaves | factors).items()
    }
    return {"out": out.detach(), **grads}


@functools.cache
def group_of(size: int) -> dist.ProcessGroup:
    """Return this process's group of `size` consecutive ranks, created once."""
    groups = [
        dist.new_group(list(range(first, first + size)))
        for first in range(0, dist.get_world_size(), size)
    ]
    return groups[dist.get_rank() // size]  # type: ignore[return-value]


def hold(tensors: Any, held: slice) -> Any:
    """Return the held experts of a stack or of adapters."""
    if isinstance(tensors, ExpertStack):
        return ExpertStack(*(PackedWeight(*(t[held] for t in w)) for w in tensors))
    return Adapters(*(one and Adapter(one.a[held], one.b[held], one.scaling) for one in tensors))


def _share(layer: Layer, size: int) -> tuple[dict[str, Any], Any]:
    """Return this process's rows, experts and adapters, and its part of the exchange."""
    rank = dist.get_rank() % size
    found = draw(layer)
    equal = len(set(layer.rows)) == 1
    rows_of_all = None if equal else layer.rows
    placement = Placement(rank, size)
    chunks = pipeline.ChunkRows(layer.chunk, layer.backward_chunk or layer.chunk)
    shared = ShardedExperts(placement, group_of(size), rows_of_all, chunk_rows=chunks)
    held = shared.held(layer.experts)
    part = slice(held.start, held.stop)
    first = sum(layer.rows[:rank])
    rows = slice(first, first + layer.rows[rank])
    own = {name: found[name][rows] for name in ("x", "indices", "weights", "dout")}
    own |= {name: hold(found[name], part) for name in ("stack", "adapters")}
    return own, partial(shared.run, experts=layer.experts, alpha=1.702, limit=7.0)


def infer_sharded(layer: Layer, size: int) -> torch.Tensor:
    """Return the output of this process's rows, without gradients."""
    own, run = _share(layer, size)
    with torch.no_grad():
        return run(*(own[name] for name in ("x", "indices", "weights", "stack", "adapters")))


def infer_through(layer: Layer, size: int, few: int) -> tuple[torch.Tensor, list[tuple[str, int]]]:
    """Return the same, and each call's backend with its rows: "small" for at most `few`, "packed".

    Args:
        layer: the layer and its rows.
        size: number of processes.
        few: number of rows.
    """
    calls, run = [], pipeline.run_held

    def choose(_: torch.Tensor, entries: int, __: int) -> str:
        return "small" if entries <= few * TOP_K else "packed"

    def note(call: Any, operands: Any, *given: Any, **named: Any) -> Any:
        calls.append((operands.backend, len(call.x)))
        return run(call, operands._replace(backend="torch"), *given, **named)

    with (
        mock.patch.object(pipeline, "choose_held", choose),
        mock.patch.object(pipeline, "run_held", note),
    ):
        return infer_sharded(layer, size), calls


def run_sharded(layer: Layer, size: int) -> dict[str, Any]:
    """Return this process's part: its rows' output and gradients, its experts' adapter gradients.

    `sent` is the number of bytes sent, by tag.
    """
    own, run = _share(layer, size)
    with (
        PIECES[layer.broken]() if layer.broken else nullcontext(),
        count_bytes() as sent,
    ):
        result = _differentiate(layer, own, run)
    return {**result, "sent": dict(sent)}


def record_calls(layer: Layer, size: int, with_rows: bool = False) -> list[Any]:
    """Return the calls of a forward and a backward pass in their order, as texts with numbers.

    Args:
        layer: the layer and its rows.
        size: number of processes.
        with_rows: whether to return the number of rows with each call.
    """
    calls: list[tuple[str, int]] = []
    texts = Counter[str]()

    def note(text: str, rows: int = 0) -> str:
        text = f"{text} {texts[text]}"
        texts[text.rpartition(" ")[0]] += 1
        calls.append((text, rows))
        return text

    def follow(name: str, describe: Any) -> Any:
        original = getattr(pipeline, name)

        def call(*given: Any, **named: Any) -> Any:
            describe(*given)
            return original(*given, **named)

        return mock.patch.object(pipeline, name, call)

    def describe_gather(rows: torch.Tensor, _: Any, tag: str) -> None:
        if tag != "expert routing":
            is_again = tag == "expert rows" and texts["forward"] > 0 and texts["recompute"] > 0
            note(f"gather {tag}{' again' * is_again}", len(rows))

    def begin_return(rows: torch.Tensor, sent: Any, received: Any, group: Any, tag: str) -> Any:
        pending = send(rows, sent, received, group, tag)
        number = note(f"send {tag}", len(rows)).rpartition(" ")[2]

        def wait() -> torch.Tensor:
            calls.append((f"await {tag} {number}", 0))
            return pending.wait()

        return mock.Mock(wait=wait)

    def is_recomputing() -> bool:
        if asked():
            calls.append(("recompute", 0))
            texts["recompute"] += 1
        return asked()

    send, asked = pipeline.start_all_to_all, pipeline.is_recomputing
    with (
        follow("start_all_gather", describe_gather),
        follow("run_held", lambda call, *_: note("forward", len(call.x))),
        follow("differentiate_held", lambda call, *_: note("backward", len(call.x))),
        mock.patch.object(pipeline, "start_all_to_all", begin_return),
        mock.patch.object(pipeline, "is_recomputing", is_recomputing),
    ):
        run_sharded(layer, size)
    return calls if with_rows else [text for text, _ in calls]


def run_replicated(layer: Layer, size: int) -> torch.Tensor:
    """Return the output when every process has all rows."""
    found, rank = draw(layer), dist.get_rank() % size
    shared = ShardedExperts(Placement(rank, size), group_of(size), replicated=True)
    held = shared.held(layer.experts)
    part = slice(held.start, held.stop)
    stack, adapters = (hold(found[name], part) for name in ("stack", "adapters"))
    with torch.no_grad():
        return shared.run(
            found["x"], found["indices"], found["weights"], stack, adapters,
            experts=layer.experts, alpha=1.702, limit=7.0,
        )  # fmt: skip


@contextmanager
def _only_own_shares() -> Any:
    """Take only the first process's share of each row instead of the sum."""

    def take_first(parts: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(parts[0])

    with mock.patch.object(pipeline, "sum_parts", take_first):
        yield


@contextmanager
def _own_gradients() -> Any:
    """Use this process's gradients of the outputs for every process's rows."""
    original = pipeline.start_all_gather

    def gather(rows: torch.Tensor, group: Any, tag: str) -> Any:
        if tag != "expert gradients":
            return original(rows, group, tag)
        own = rows.expand(dist.get_world_size(group), *rows.shape).contiguous()
        return mock.Mock(wait=lambda: own)

    with mock.patch.object(pipeline, "start_all_gather", gather):
        yield


PIECES = {
    "sum of shares": _only_own_shares,
    "gathered gradients": _own_gradients,
}
