"""Move rows to the processes that hold their experts, and the results back, in chunks.

Forward, for each chunk of rows of every process:

    gather    every process gets every process's rows (all-gather)
    compute   its experts' share of each row's weighted sum
    return    the shares go home (all-to-all, the bytes of a reduce-scatter), added in rank order

Training rounds each share to the rows' dtype. Without a backward pass shares are exact (fp64), and
each process's rows run through the backend that they would have alone, so that a row's sum has the
bits that one process computes. A difference in the last one changes which experts a later layer
chooses where two are close: log-likelihoods of a model with random weights differed by up to 2 %
from one process's with shares in bf16, by up to 0.8 % with a backend chosen by the rows of all.

The chunk after is gathered, and the one before returned, while a chunk is computed. Sizes do not
depend on the routing: a process with many rows for its experts takes longer, but needs no more
memory. Where processes have different numbers of rows, the missing ones are padded with rows that
are routed to no expert.

Backward gathers rows and gradients of the outputs, and returns gradients of the rows. The first
chunk of the gradients is requested at once: it travels while a checkpointed layer recomputes its
attention.
The recomputation itself exchanges nothing: the layer ends with the experts, and the backward pass
needs only their input. Gathered routing and its order are kept from the forward pass (40 bytes a
row with four experts a token).

An adapter's gradient is complete once backward is: it covers the rows of the whole group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn import functional

from sparselong.kernels import Passing
from sparselong.kernels.experts import (
    Adapters,
    ExpertCall,
    ExpertOperands,
    Gradients,
    choose_held,
    differentiate_held,
    run_held,
    slices,
    sum_parts,
)
from sparselong.parallel.collectives import Pending, start_all_gather, start_all_to_all
from sparselong.runtime import is_checkpointed, is_recomputing, unused_output


class ChunkRows(NamedTuple):
    """Most rows of a process in a chunk, in the passes of training."""

    forward: int
    backward: int


FAR_ROWS, NEAR_ROWS = ChunkRows(2048, 4096), ChunkRows(4096, 4096)
"""Chunks of GPUs without peer access, and with it.

Large chunks make matrix products faster, small ones hide more of the exchange behind them. The
faster the exchange, the less there is to hide: four H100 computed a step of gpt-oss-120b in 0.51 s
with 2,048 rows, 0.45 s with 4,096. A backward pass has more to hide it behind: the gradients of the
outputs travel beside the recomputation, the rows beside the first product.
"""
INFERENCE_ROWS = 8192
"""Most rows of all processes in a chunk without a backward pass, whose shares take more memory."""


@dataclass(frozen=True)
class Job:
    """What an exchange's passes have in common.

    Attributes:
        operands: the held experts' weights and adapters; the backend is chosen for each chunk.
        held: the experts that this process holds.
        experts: the layer's number of experts.
        rows: number of rows of each process.
        group: the processes.
        chunk_rows: most rows of a process in a chunk.
    """

    operands: ExpertOperands
    held: range
    experts: int
    rows: tuple[int, ...]
    group: dist.ProcessGroup
    chunk_rows: ChunkRows

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self.rows)

    def chunks(self, passing: Passing) -> list[slice]:
        """Return the chunks of every process's rows, padded to the largest number."""
        most = self.chunk_rows.backward if passing == "backward" else self.chunk_rows.forward
        if passing == "inference":
            most = min(most, max(1, INFERENCE_ROWS // self.size))
        return slices(max(self.rows), most) if max(self.rows) else []

    def pad(self, rows: torch.Tensor, value: float = 0) -> torch.Tensor:
        """Return this process's rows [rows, ...], padded to the largest number."""
        missing = max(self.rows) - len(rows)
        if missing:
            rows = functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing), value=value)
        return rows.contiguous()

    def operands_for(self, call: ExpertCall) -> ExpertOperands:
        """Return the operands for calls as large as this: backend, and dtype of the adapters."""
        backend = choose_held(call.x, call.indices.numel(), self.experts)
        return self.operands._replace(backend=backend).in_dtype(call.x.dtype)

    def operands_in(self, passing: Passing, call: ExpertCall) -> ExpertOperands:
        """Return the same with the experts on the device, for all chunks of one pass."""
        return self.operands_for(call).fetch(passing)

    def backends(self, call: ExpertCall) -> list[tuple[str, slice]]:
        """Return the backends that processes would choose alone, each with the chunk's rows."""
        top_k, rows = call.indices.shape[1], len(call.x) // self.size
        names = [choose_held(call.x, count * top_k, self.experts) for count in self.rows]
        groups = [list(ranks) for _, ranks in groupby(range(self.size), names.__getitem__)]
        return [
            (names[ranks[0]], slice(ranks[0] * rows, (ranks[-1] + 1) * rows)) for ranks in groups
        ]


class Routing(NamedTuple):
    """Every process's routing, gathered; chunks are views of [processes, rows, top_k].

    Attributes:
        indices: int32, -1 in padding.
        weights: floating.
        sorted: what `run_held` returned for each chunk that it has run on, by the chunk's first and
            last row.
    """

    indices: torch.Tensor
    weights: torch.Tensor
    sorted: dict[tuple[int, int], Any]

    def call(self, x: torch.Tensor, chunk: slice) -> ExpertCall:
        """Return the call for a gathered chunk of rows."""
        flat = (part[:, chunk].flatten(0, 1).contiguous() for part in self[:2])
        return ExpertCall(x, *flat)

    def order(self, chunk: slice) -> Any:
        """Return the order of a chunk's rows; None if another pass had other chunks."""
        return self.sorted.get((chunk.start, chunk.stop))


def run_sharded(call: ExpertCall, job: Job) -> torch.Tensor:
    """Return the weighted sums of this process's rows, differentiable, [rows, hidden]."""
    return _ShardedPass.apply(job, *call, *job.operands.adapters.factors)  # pyright: ignore[reportReturnType]


class _ShardedPass(torch.autograd.Function):
    """A layer's experts over the rows of all processes of the group, with gradients.

    Saved for the backward pass: x and the routing. A checkpointed layer's recomputation does not
    gather the routing again, unless backward runs through the recomputation's own node. Experts in
    host memory are fetched in either pass. Weights and adapters are referenced, not saved: the
    optimizer changes them only after a step's backward passes. `factors` repeats the adapters'
    tensors, because autograd tracks only tensors passed as separate arguments.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        job: Job,
        x: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        *factors: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.job, ctx.routing = job, None
        ctx.save_for_backward(x, indices, weights)
        if is_recomputing():
            return unused_output(x)
        is_followed = any(ctx.needs_input_grad) or is_checkpointed()  # by a backward pass
        passing = "forward" if is_followed else "inference"
        out, ctx.routing = run_forward(ExpertCall(x, indices, weights), job, passing)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        job, needs = ctx.job, ctx.needs_input_grad
        chunks = job.chunks("backward")
        arriving = _arriving(job.pad(dout), chunks, job.group, "expert gradients")
        call = ExpertCall(*ctx.saved_tensors)  # a checkpointed layer is recomputed here
        routing = ctx.routing or _start_routing(call, job)()
        sums = job.operands.adapters.make_sums()
        dx, dweights = _run_backward(call.x, arriving, routing, job, sums)
        factors = [
            None if total is None else total.to(factor.dtype)
            for total, factor in zip(sums.factors, job.operands.adapters.factors, strict=True)
        ]
        return None, dx if needs[1] else None, None, dweights if needs[3] else None, *factors


def run_forward(
    call: ExpertCall, job: Job, passing: Passing = "inference"
) -> tuple[torch.Tensor, Routing]:
    """Return the weighted sums of this process's rows, and every process's routing."""
    x, arriving_routing = job.pad(call.x), _start_routing(call, job)
    arriving = _arriving(x, job.chunks(passing), job.group, "expert rows")
    routing, out = arriving_routing(), torch.empty_like(x)
    home: list[tuple[slice, Pending]] = []
    operands = None
    for chunk, rows in arriving:
        part = routing.call(rows.wait(), chunk)
        operands = operands or job.operands_in(passing, part)
        share = torch.empty_like(part.x, dtype=share_dtype(x.dtype, passing))
        if passing == "inference":
            for backend, own in job.backends(part):
                named = operands._replace(backend=backend)
                run_held(part.part(own), named, job.held, share[own], experts=job.experts)
        else:
            order = run_held(part, operands, job.held, share, experts=job.experts)
            routing.sorted[chunk.start, chunk.stop] = order
        home.append((chunk, _send_home(share, job, "expert sums")))
        if len(home) > 1:
            _add(*home.pop(0), out, job)
    for chunk, pending in home:
        _add(chunk, pending, out, job)
    return out[: len(call.x)], routing


def share_dtype(dtype: torch.dtype, passing: Passing) -> torch.dtype:
    """Return the dtype of partial sums of rows in `dtype`."""
    return torch.float64 if passing == "inference" else dtype


def _run_backward(
    x: torch.Tensor, douts: Iterator[Arriving], routing: Routing, job: Job, sums: Adapters
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of this process's rows and routing weights; add to the adapters'."""
    rows, x = len(x), job.pad(x)
    dx, dweights = torch.empty_like(x), torch.empty_like(routing.weights)
    home: list[tuple[slice, Pending]] = []
    operands = None
    arriving = _arriving(x, job.chunks("backward"), job.group, "expert rows")
    for (chunk, whole), (_, dout) in zip(arriving, douts, strict=True):
        part = routing.call(dout.wait(), chunk)
        operands = operands or job.operands_in("backward", part)
        share = Gradients(torch.empty_like(part.x), torch.empty_like(part.weights), adapters=sums)
        order = routing.order(chunk)
        differentiate_held(
            part, whole.wait, operands, job.held, share, experts=job.experts, rows=order
        )
        assert share.x is not None and share.weights is not None
        dweights[:, chunk] = share.weights.view(job.size, -1, part.weights.shape[1])
        home.append((chunk, _send_home(share.x, job, "expert row gradients")))
        if len(home) > 1:
            _add(*home.pop(0), dx, job)
    back = _send_home(dweights.flatten(0, 1), job, "routing gradients")
    for chunk, pending in home:
        _add(chunk, pending, dx, job)
    total = back.wait().view_as(dweights).sum(0)  # all but one are zero
    return dx[:rows], total[:rows]


class Gathered(NamedTuple):
    """A chunk's rows on their way from all processes."""

    pending: Pending

    def wait(self) -> torch.Tensor:
        """Return [processes * rows, hidden]."""
        return self.pending.wait().flatten(0, 1)


Arriving = tuple[slice, Gathered]


def _arriving(
    x: torch.Tensor, chunks: list[slice], group: dist.ProcessGroup, tag: str
) -> Iterator[Arriving]:
    """Request the first chunk's rows now; yield each chunk and all processes' rows of it.

    The next chunk is on its way while one is used.

    Args:
        x: this process's rows, padded.
        chunks: the chunks.
        group: the processes.
        tag: the tag under which bytes are counted.
    """
    pending = [Gathered(start_all_gather(x[chunk], group, tag)) for chunk in chunks[:1]]

    def rest() -> Iterator[Arriving]:
        for number, chunk in enumerate(chunks):
            for after in chunks[number + 1 : number + 2]:
                pending.append(Gathered(start_all_gather(x[after], group, tag)))
            yield chunk, pending.pop(0)

    return rest()


def _start_routing(call: ExpertCall, job: Job) -> Callable[[], Routing]:
    """Gather every process's indices and weights in one exchange; return what waits for it."""
    indices, weights = job.pad(call.indices.int(), -1), job.pad(call.weights)
    parts = [part.view(torch.uint8) for part in (indices, weights)]
    pending = start_all_gather(torch.cat(parts, 1), job.group, "expert routing")

    def wait() -> Routing:
        cut = pending.wait().split([part.shape[1] for part in parts], 2)
        both = [part.clone(memory_format=torch.contiguous_format) for part in cut]
        return Routing(both[0].view(torch.int32), both[1].view(weights.dtype), {})

    return wait


def _send_home(shares: torch.Tensor, job: Job, tag: str) -> Pending:
    """Send each process the shares [processes * rows, ...] of its own rows."""
    counts = [len(shares) // job.size] * job.size
    return start_all_to_all(shares, counts, counts, job.group, tag)


def _add(chunk: slice, pending: Pending, out: torch.Tensor, job: Job) -> None:
    """Write the sum of the shares that arrived for a chunk of this process's rows."""
    received = pending.wait()
    sum_parts(received.view(job.size, -1, received.shape[1]), out[chunk])
