"""A model in gpt-oss-120b's shape and its training step, for fit_120b.py."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.fit_120b_plan import SHAPES, rows_of
from sparselong.adapters.expert_factors import sharded_parameters
from sparselong.memory import Kept
from sparselong.model import find_host_experts
from sparselong.model.host_experts import HostExperts
from sparselong.parallel.apply import shard_model, share_batch
from sparselong.parallel.gradients import gradient_norm, reduce_gradients
from sparselong.parallel.loss import add_losses, count_step
from sparselong.runtime.settings import using

Case = dict[str, Any]


class Model(NamedTuple):
    """A model on this rank.

    Attributes:
        tuned: the model with adapters, in PEFT's wrapper.
        mesh: this process's place in the mesh; None if it trains alone, which exchanges nothing.
        data_rank: index of its sequence in a step.
        host: its experts in host memory; None: they are on the GPU.
        hashes: of the experts' tensors there, before training.
        resident: bytes on the GPU by component.
    """

    tuned: Any
    mesh: Any
    data_rank: int
    host: HostExperts | None
    hashes: dict[str, str]
    resident: dict[str, float]

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The trained parameters."""
        return [p for p in self.tuned.parameters() if p.requires_grad]


def prepare(case: Case, mesh: Any) -> Model:
    """Return a case's model with random weights, the same replicated ones on every rank."""
    from benchmarks.shape_20b import adapt, build_packed, config_of

    _, experts, vocab = SHAPES[case["shape"]]
    alone = case["gpus"] == 1
    torch.manual_seed(0)
    before = torch.cuda.memory_allocated()
    placement = case["placement"]
    with using(**shard_model(None if alone else mesh), expert_placement=placement):
        packed = build_packed(config_of(case["layers"], experts, vocab), case["arm"])
        resident: dict[str, float] = {"packed_bytes": torch.cuda.memory_allocated() - before}
        tuned = adapt(packed, case["arm"], Kept(), expert_dtype=torch.bfloat16)
    resident["weight_bytes"] = torch.cuda.memory_allocated() - before
    host = find_host_experts(tuned)
    hashes = host.hash_tensors() if host else {}
    own = Model(tuned, None if alone else mesh, mesh.data_rank, host, hashes, resident)
    resident["adapter_bytes"] = sum(p.nbytes for p in own.trained)  # included in the weights
    torch.cuda.empty_cache()  # of what was allocated to draw the weights
    return own


def make_optimizer(arm: str, trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return the arm's optimizer, with a learning rate of 0 so that every step is the same."""
    if arm == "experts":
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-untyped]

        return AdamW8bit(trained, lr=0.0)
    return torch.optim.AdamW(trained, lr=0.0, fused=True)


def arrange_layers(own: Model, case: Case) -> None:
    """Let the layers compute and keep what the case says."""
    from benchmarks.shape_20b import compute_layers

    kept = Kept(case["keep_attention"] == "always")
    offloads = case["training.offload_checkpoints"]
    compute_layers(own.tuned.get_base_model(), kept, rows_of(case), offloads=offloads)


def make_pass(own: Model, case: Case, stride: int, **settings: Any) -> Callable[[], torch.Tensor]:
    """Return a function for a step's gradients on random tokens; it returns this rank's loss."""
    sharded = list(sharded_parameters(own.tuned).values())
    generator = torch.Generator().manual_seed(own.data_rank)
    vocab = SHAPES[case["shape"]][2]
    ids = torch.randint(vocab, (1, case["tokens"]), generator=generator).cuda()
    settings |= {"attention_backend": case["attention_backend"]}

    def differentiate() -> torch.Tensor:
        batch = {"input_ids": ids, "labels": ids}
        count = count_step([batch], own.mesh, case["tokens"]).divisor
        local, changes = share_batch(batch, own.mesh, stride)
        with using(**changes, **settings):
            loss = own.tuned(**local, num_items_in_batch=count, use_cache=False).loss
            loss.backward()
        if own.mesh is not None:
            reduce_gradients(own.trained, own.mesh, sharded)
        return loss.detach()

    return differentiate


def make_step(
    own: Model, optimizer: torch.optim.Optimizer, case: Case, stride: int
) -> Callable[[], torch.Tensor]:
    """Return a function that makes one optimizer step and returns the loss of all ranks."""
    trained, sharded = own.trained, list(sharded_parameters(own.tuned).values())
    differentiate = make_pass(own, case, stride)

    def step() -> torch.Tensor:
        loss = differentiate()
        gradient_norm(trained, own.mesh, sharded)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss if own.mesh is None else add_losses(loss, own.mesh)

    return step


def compare_placements(case: Case, args: argparse.Namespace, mesh: Any) -> dict[str, float]:
    """Return how many of the losses and gradients are the same bits with experts in either place.

    Attention is deterministic. `tensors_repeated` are those that are the same bits in two runs
    with experts on the GPU, with which the comparison could find any difference at all.
    """
    first, again, hosted = (
        _gradients(case | {"placement": placement}, args, mesh)
        for placement in ("gpu", "gpu", "host")
    )
    assert first.keys() == hosted.keys()
    return {
        "tensors_compared": len(first),
        "tensors_repeated": sum(torch.equal(first[name], again[name]) for name in first),
        "tensors_equal": sum(torch.equal(first[name], hosted[name]) for name in first),
        "tensors_nonzero": sum(bool(tensor.any()) for tensor in hosted.values()),
    }


def _gradients(case: Case, args: argparse.Namespace, mesh: Any) -> dict[str, torch.Tensor]:
    """Return the loss and all gradients of two steps' sum, in host memory."""
    own = prepare(case, mesh)
    arrange_layers(own, case)
    differentiate = make_pass(own, case, args.stride, deterministic=True)
    losses = [differentiate() for _ in range(2)]
    named = own.tuned.named_parameters()
    found = {name: p.grad.cpu() for name, p in named if p.requires_grad and p.grad is not None}
    found |= {f"loss {number}": loss.cpu() for number, loss in enumerate(losses)}
    del own, differentiate
    gc.collect()
    torch.cuda.empty_cache()
    return found
