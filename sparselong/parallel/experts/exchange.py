"""The expert exchange of `runtime.Settings.experts`: which experts a process holds, and its passes.

The processes of an expert group share a layer's experts. Each brings the rows that it computes with
(tokens after the layer's second norm); what these are does not matter: shards of one sequence,
different sequences, or nothing. `pipeline.py` moves rows to the experts and results back, because a
layer's rows take far fewer bytes than its experts: 71 MB in each direction for gpt-oss-120b at
16,384 tokens on four GPUs, against 1,269 MB of packed weights.

When the processes hold the same rows (`replicated`), as in generation, nothing is gathered: each
computes its experts' share of them, and the shares are added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from sparselong.kernels import ExpertStack, Gate, HostStack
from sparselong.kernels.experts import (
    Adapters,
    ExpertCall,
    ExpertOperands,
    run_held,
    split_evenly,
    sum_parts,
)
from sparselong.parallel.collectives import all_gather
from sparselong.parallel.experts.pipeline import (
    FAR_ROWS,
    ChunkRows,
    Job,
    run_forward,
    run_sharded,
    share_dtype,
)
from sparselong.parallel.placement import Placement
from sparselong.runtime import is_checkpointed

TAG = "expert sums"


@dataclass(frozen=True)
class ShardedExperts:
    """A process's place in an expert group, and what the group's processes bring to a pass.

    Attributes:
        placement: the process's place in the group.
        group: the processes that share the experts.
        rows: number of rows of each process in the pass; None: all bring as many as this one.
        replicated: whether all bring the same rows. Such passes have no gradients.
        chunk_rows: most rows of a process that are exchanged at once; the same in all.
        sequences: number of sequences of each process, among which its rows are equally divided;
            None: one each.
    """

    placement: Placement
    group: dist.ProcessGroup
    rows: tuple[int, ...] | None = None
    replicated: bool = False
    chunk_rows: ChunkRows = FAR_ROWS
    sequences: tuple[int, ...] | None = None

    def divide(self, most: int) -> list[ShardedExperts] | None:
        """Return exchanges for slices of at most `most` rows, the same number in every process.

        Each process divides the tokens of its sequences evenly. There are fewer slices, of more
        rows, if a process has fewer tokens than that. None: all bring as many rows as this one.
        """
        if self.rows is None:
            return None
        batches = self.sequences or (1,) * len(self.rows)
        tokens = [rows // batch for rows, batch in zip(self.rows, batches, strict=True)]
        count = max(1, min(*tokens, -(-max(self.rows) // most)))
        parts = zip(*(split_evenly(each, count) for each in tokens), strict=True)
        return [
            replace(
                self,
                rows=tuple(
                    batch * (part.stop - part.start)
                    for batch, part in zip(batches, together, strict=True)
                ),
            )
            for together in parts
        ]

    def held(self, experts: int) -> range:
        """Return which of a layer's experts this process holds.

        Raises:
            StageError: the experts cannot be split evenly.
        """
        return self.placement.experts(experts)

    def run(
        self,
        x: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        stack: ExpertStack | HostStack,
        adapters: Adapters,
        *,
        experts: int,
        alpha: float,
        limit: float,
    ) -> torch.Tensor:
        """Return the weighted sum of each row's expert outputs, [rows, hidden] in x's dtype.

        Every process of the group must call this, also one without rows. Gradients flow to x, the
        routing weights and the adapters; those of an adapter include every process's rows.

        Args:
            x: [rows, hidden].
            indices: int32 or int64 [rows, top_k], in [0, experts).
            weights: floating [rows, top_k].
            stack: the held experts' packed weights and biases.
            adapters: the held experts' adapters.
            experts: the layer's number of experts.
            alpha: factor of the gate inside the sigmoid.
            limit: bound that clips gate and up.

        Raises:
            ValueError: an argument does not fit; the message names it.
            ExchangeError: a rank is gone, or did not take part in time.
        """
        held = self.held(experts)
        call = ExpertCall(x, indices, weights)
        self._check(call, stack, held, experts)
        operands = ExpertOperands(stack, adapters, Gate(float(alpha), float(limit)), "")
        rows = self.rows or (len(x),) * self.placement.size
        job = Job(operands, held, experts, rows, self.group, self.chunk_rows)
        needs_gradient = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad
            for tensor in (x, weights, *adapters.factors)
        )
        if self.replicated:
            return self._add_shares(call, job, needs_gradient)
        if needs_gradient or is_checkpointed():
            return run_sharded(call, job)
        return run_forward(call, job)[0]

    def _check(
        self,
        call: ExpertCall,
        stack: ExpertStack | HostStack,
        held: range,
        experts: int,
    ) -> None:
        call.check(experts)
        if stack.experts != len(held):
            raise ValueError(
                f"stack: {stack.experts} experts; allowed: the {len(held)} that this process holds"
            )
        if any(bias.requires_grad for bias in (stack.gate_up.bias, stack.down.bias)):
            raise ValueError("stack: a bias requires a gradient; allowed: frozen biases")
        if self.rows is not None and self.rows[self.placement.rank] != len(call.x):
            raise ValueError(
                f"x: {len(call.x)} rows; allowed: the {self.rows[self.placement.rank]} that were "
                "announced to the other processes"
            )

    def _add_shares(self, call: ExpertCall, job: Job, needs_gradient: bool) -> torch.Tensor:
        """Return the sum of every process's share of the same rows."""
        if needs_gradient:
            raise ValueError("x: requires a gradient; allowed with replicated rows: none")
        call = call.contiguous()
        out = torch.empty_like(call.x)
        share = torch.empty_like(out, dtype=share_dtype(out.dtype, "inference"))
        operands = job.operands_for(call).fetch_or_read(call.indices.numel(), job.experts)
        run_held(call, operands, job.held, share, experts=job.experts)
        sum_parts(torch.stack(all_gather(share, self.group, TAG)), out)
        return out
