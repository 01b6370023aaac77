"""Trains adapters of attention, router and experts of a small packed gpt-oss, in one process or in
several that share experts and vocabulary; single pieces can be disabled, which the tests must
notice."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from sparselong.adapters import expert_lora, sharded_parameters
from sparselong.adapters.expert_lora import EXPERT_WEIGHTS, RouterLora, add_expert_lora
from sparselong.config import Config
from sparselong.finetune import gathering
from sparselong.kernels.layer import IGNORED
from sparselong.model import PackedExperts, chunk_loss, load_model
from sparselong.model.host_experts import find_host_experts
from sparselong.model.row_slices import slice_rows
from sparselong.parallel.apply import shard_model, share_batch
from sparselong.parallel.collectives import all_gather
from sparselong.parallel.gradients import gradient_norm, reduce_gradients
from sparselong.parallel.loss import add_losses, count_step, mean_loss
from sparselong.parallel.mesh import Mesh, build_mesh
from sparselong.parallel.vocabulary import sharded as vocabulary
from sparselong.processes import find_world, sharing, world
from sparselong.runtime import HostInputs, checkpoint_contexts, using

Batch = dict[str, torch.Tensor]


@functools.cache
def mesh_of(context_size: int, expert_size: int) -> Mesh:
    """Return this process's mesh, whose groups are created once."""
    return build_mesh(context_size, expert_size=expert_size)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        base: the checkpoint.
        adapters: file with the first values of all adapters (`draw_adapters`).
        steps: micro-batches by step, accumulation step and data rank.
        norm: gradients are clipped to this norm.
        first: first step to train.
        last: step after the last one to train.
        saved: folder of the state to begin with, if it exists, and to write at the end.
        dtype: of the experts' adapters.
        broken: piece to disable, one of `PIECES`.
        rows: tokens that a layer processes at once, with its inputs on the host; None: all.
        placement: where the experts are.
    """

    base: Path
    adapters: Path
    steps: list[list[list[Batch]]]
    norm: float = 0.5
    first: int = 0
    last: int | None = None
    saved: Path | None = None
    dtype: torch.dtype = torch.float32
    broken: str | None = None
    rows: int | None = None
    placement: str = "gpu"


@dataclass
class Result:
    """Losses and gradient norms by step, evaluation loss, gradients of the first step, and final
    weights, those of all experts; bytes of experts that were copied from host memory."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    eval_loss: float = 0.0
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    copied_bytes: int = 0


def open_model(base: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Open the model, whole or in part, with adapters on attention, router and experts."""
    model = load_model(base, device=torch.device("cpu"), attn_implementation="sparselong")
    chunk_loss(model)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "experts", "router"],
    )

    def experts(target: nn.Module, adapter_name: str, **given: Any) -> nn.Module:
        return add_expert_lora(
            target, adapter_name, config, weights=EXPERT_WEIGHTS, name=given["target_name"],
            r=2, lora_alpha=8, dtype=dtype,
        )  # fmt: skip

    def router(target: Any, adapter_name: str, **given: Any) -> nn.Module:
        return RouterLora(
            target, adapter_name, config, name=given["target_name"], r=4, lora_alpha=8
        )

    config._register_custom_module({PackedExperts: experts, GptOssTopKRouter: router})  # type: ignore[arg-type]
    tuned: Any = get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    contexts = partial(checkpoint_contexts, False)
    tuned.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    tuned.enable_input_require_grads()
    return tuned.train()


def draw_adapters(base: Path, path: Path) -> None:
    """Write first values with which no gradient is zero."""
    generator = torch.Generator().manual_seed(3)
    state = {
        name: 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in open_model(base).state_dict().items()
        if "lora_" in name
    }
    torch.save(state, path)


def train_alone(run: Run) -> Result:
    """Train in one process, as the reference."""
    return _train(run, None)


def train_sharded(run: Run, context_size: int, expert_size: int) -> Result:
    """Run this rank's part of the same training."""
    return _train(run, mesh_of(context_size, expert_size))


def train_on_machines(run: Run, here: int, config: Config) -> tuple[dict[str, list[int]], Result]:
    """Join with the variables that torchrun sets on machines of `here` processes, and train.

    Returns:
        The ranks of this process's groups, and its result.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    local = {"LOCAL_RANK": str(rank % here), "LOCAL_WORLD_SIZE": str(here)}
    with (
        mock.patch.dict(os.environ, {"RANK": str(rank), "WORLD_SIZE": str(size), **local}),
        mock.patch.object(world, "_mesh", None),
        mock.patch.object(sharing, "_decided", None),
    ):
        assert find_world(config).local == {rank: rank % here}
        shared_by = sharing.decide_sharing(config).chosen
        mesh = world.join(config.sequence_parallel_degree, shared_by)
        assert "LOCAL_WORLD_SIZE" not in os.environ and world.is_first() == (rank == 0)
        kinds = ("context", "data", "expert", "replica")
        groups = {
            kind: dist.get_process_group_ranks(getattr(mesh, f"{kind}_group")) for kind in kinds
        }
        return groups, _train(run, mesh)


def _train(run: Run, mesh: Mesh | None) -> Result:
    settings = {**shard_model(mesh), "expert_placement": run.placement}
    with _unrounded_router(), using(**settings), _as_world(mesh):
        model = open_model(run.base, run.dtype)
        if run.rows is not None:
            slice_rows(model.get_base_model(), run.rows, HostInputs(), keep_attention=True)  # pyright: ignore[reportCallIssue]
        with PIECES[run.broken]() if run.broken else nullcontext():
            return _Training(run, model, mesh).go()


class _Training:
    """The trainer's steps, without Axolotl."""

    def __init__(self, run: Run, model: nn.Module, mesh: Mesh | None):
        self.run, self.model, self.mesh = run, model, mesh
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.sharded = sharded_parameters(model)
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-2, eps=1e-3)
        adapters = torch.load(run.adapters)
        if run.saved is not None and (run.saved / "adapters.pt").exists():
            adapters = torch.load(run.saved / "adapters.pt")
            states = torch.load(run.saved / "optimizer.pt")
            if mesh is not None:
                states = gathering.cut_states(states, model, self.optimizer, mesh)
            self.optimizer.load_state_dict(states)
            gathering.check_states(self.optimizer, run.saved)
        unexpected = model.load_state_dict(adapters, strict=False).unexpected_keys
        assert not unexpected

    def go(self) -> Result:
        result = Result()
        for step in self.run.steps[self.run.first : self.run.last]:
            result.losses.append(self._accumulate(step))
            if not result.gradients:
                grads = {n: p.grad for n, p in self.trained.items()}
                result.gradients = self._whole(grads)
            result.norms.append(float(self._clip()))
            self.optimizer.step()
            self.optimizer.zero_grad()
        result.weights = self._whole({n: p.detach() for n, p in self.trained.items()})
        host = find_host_experts(self.model)
        result.copied_bytes = host.copied_bytes if host else 0
        result.eval_loss = self._evaluate()
        if self.run.saved is not None:
            self._save(self.run.saved)
        return result

    def _loss(self, batch: Batch, count: Any) -> tuple[torch.Tensor, Any]:
        local, changes = share_batch(batch, self.mesh)
        with using(**changes):
            loss = self.model(**local, num_items_in_batch=count, use_cache=False).loss
        return loss, local

    def _accumulate(self, step: list[list[Batch]]) -> float:
        rank = self.mesh.data_rank if self.mesh else None
        mine = [b for micro in step for b in (micro if rank is None else [micro[rank]])]
        count = count_step(mine, self.mesh, 0).divisor
        total = torch.zeros(())
        for batch in mine:
            loss, _ = self._loss(batch, count)
            loss.backward()
            total += loss.detach()
        if self.mesh is None:
            return float(total)
        reduce_gradients(self.model.parameters(), self.mesh, self.sharded.values())
        return float(add_losses(total, self.mesh))

    def _clip(self) -> torch.Tensor:
        trained = list(self.trained.values())
        if self.mesh is None:
            return nn.utils.clip_grad_norm_(trained, self.run.norm)
        norm = gradient_norm(trained, self.mesh, self.sharded.values())
        nn.utils.clip_grads_with_norm_(trained, self.run.norm, norm)
        return norm

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Evaluate the first batch; data ranks other than the first get nothing."""
        self.model.eval()
        batch = self.run.steps[-1][0][0]
        if self.mesh is not None and self.mesh.data_rank > 0:
            batch = self.run.steps[-1][0][self.mesh.data_rank]
            batch = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
        loss = mean_loss([self._loss(batch, 1)], self.mesh)
        self.model.train()
        return loss

    def _whole(self, tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return copies, in which those of sharded parameters have all experts."""
        copies = {}
        for name, tensor in tensors.items():
            if name in self.sharded:
                assert self.mesh is not None
                tensor = torch.cat(all_gather(tensor, self.mesh.expert_group, "test"))
            copies[name] = tensor.clone()
        return copies

    def _save(self, folder: Path) -> None:
        if self.mesh is None:
            whole = gathering.Whole(self.model.state_dict(), self.optimizer.state_dict())
        else:
            whole = gathering.gather_whole(self.model, self.optimizer, self.mesh)
        if self.mesh is None or dist.get_rank() == 0:
            adapters = {n: t for n, t in whole.model.items() if "lora_" in n}
            torch.save(adapters, folder / "adapters.pt")
            torch.save(whole.optimizer, folder / "optimizer.pt")
        if self.mesh is not None:
            dist.barrier()


@contextmanager
def _unrounded_router() -> Iterator[None]:
    """Leave out the rounding of the router's weight, in which a last bit becomes a large step."""

    def keep(total: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return total.to(dtype)

    with mock.patch.object(expert_lora, "_Round", SimpleNamespace(apply=keep)):
        yield


@contextmanager
def _as_world(mesh: Mesh | None) -> Iterator[None]:
    """Let functions that ask for this process's rank find the mesh."""
    with mock.patch.object(world, "_mesh", mesh):
        yield


def _here(name: str, change: Any) -> Any:
    """Return a block in which a function of this module's steps is replaced."""
    original = globals()[name]
    return lambda: mock.patch.dict(globals(), {name: partial(change, original)})


def _offset_labels(original: Any, labels: torch.Tensor, *given: Any) -> Any:
    return original(torch.where(labels > 0, labels - 1, labels), *given)


PIECES: dict[str, Any] = {
    "experts reduced over all": _here(
        "reduce_gradients", lambda original, parameters, mesh, _: original(parameters, mesh)
    ),
    "experts reduced over none": _here(
        "reduce_gradients",
        lambda original, parameters, mesh, sharded: original(
            [p for p in parameters if all(p is not one for one in sharded)], mesh
        ),
    ),
    "norm of the own part": _here(
        "gradient_norm", lambda original, parameters, mesh, _: original(parameters, mesh)
    ),
    "norm of replicas counted twice": _here(
        "gradient_norm",
        lambda original, parameters, mesh, _: original(parameters, mesh, parameters),
    ),
    "vocabulary offset": lambda: mock.patch.object(
        vocabulary, "gather_labels", partial(_offset_labels, vocabulary.gather_labels)
    ),
}
