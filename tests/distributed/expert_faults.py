"""Ranks that share experts and fail: in an exchange, without memory, or while a checkpoint is
written. Checkpoints are written by the trainer's own code."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from transformers import Trainer

from sparselong.finetune import checkpoints, gathering
from sparselong.finetune.masked_trainer import MaskedTraining
from sparselong.finetune.state import Progress
from sparselong.parallel import shard_model
from sparselong.parallel.experts import pipeline
from sparselong.processes import sharing, telling_memory, world
from sparselong.processes.sharing import Sharing
from sparselong.processes.watch import watch_ranks
from sparselong.runtime import using
from tests.distributed.expert_training import Run, mesh_of, open_model, train_sharded

PLAN = Sharing("auto", 2, 60 * 2**30, 21 * 2**30, 23 * 2**30, "auto", "gpu", 0, 64 * 2**30)


def fail_in_exchange(how: str, which: int, run: Run, folder: Path) -> str:
    """Train until rank `which` fails in an exchange of experts; return this rank's error."""
    sys.stderr = (folder / f"{dist.get_rank()}.txt").open("w", buffering=1)
    original, calls = pipeline._send_home, []

    def send_home(*given: Any) -> Any:
        calls.append(None)
        if dist.get_rank() == which and len(calls) == 5:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
        return original(*given)

    try:
        with (
            mock.patch.object(sharing, "_decided", PLAN),
            watch_ranks(20.0, silence_seconds=2.0, beat_seconds=0.2),
            telling_memory(),
            mock.patch.object(pipeline, "_send_home", send_home),
        ):
            train_sharded(run, 2, 2)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


class Training(MaskedTraining):
    """The trainer with a small model; of transformers' part, what reads and writes checkpoints."""

    def __init__(self, run: Run, folder: Path, mesh: Any):
        with using(**shard_model(mesh)):
            self.model = open_model(run.base, run.dtype)
        unexpected = self.model.load_state_dict(torch.load(run.adapters), strict=False)
        assert not unexpected.unexpected_keys
        self.mesh, self.progress = mesh, Progress()
        limits = SimpleNamespace(save_total_limit=3)
        self.run = SimpleNamespace(  # type: ignore[assignment]
            checkpoints=folder, config=SimpleNamespace(training=limits)
        )
        self.state: Any = SimpleNamespace(
            global_step=2, best_global_step=None, best_model_checkpoint=None
        )
        self.args = SimpleNamespace(world_size=1)
        self.processing_class = self.data_collator = None
        self.is_deepspeed_enabled = self.is_fsdp_enabled = self.is_fsdp_xla_v1_enabled = False
        self.args.should_save = True
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.1)
        self.lr_scheduler: Any = torch.optim.lr_scheduler.ConstantLR(self.optimizer)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 0.25)
                if "experts" not in name:
                    parameter.grad.normal_(generator=generator)

    def step(self, number: int) -> None:
        """Train a step and save it."""
        self.optimizer.step()
        self.state.global_step = number
        self._save_checkpoint(None, None)

    def write(self, model: Any, trial: Any) -> None:
        """Write what transformers' trainer writes, as far as checkpoints are checked."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        self._save(str(folder))
        self._save_optimizer_and_scheduler(str(folder))
        torch.save({}, folder / "rng_state.pth")
        text = f'{{"global_step": {self.state.global_step}}}'
        (folder / checkpoints.TRAINER_STATE).write_text(text)


@contextmanager
def training(run: Run, folder: Path, expert_size: int) -> Any:
    """Yield the trainer of this process: alone, or as a rank of a group that shares experts."""
    mesh = mesh_of(expert_size, expert_size) if expert_size > 1 else None
    with (
        mock.patch.object(Trainer, "_save_checkpoint", Training.write),
        mock.patch.object(world, "_mesh", mesh),
    ):
        yield Training(run, folder, mesh)


def save_and_load(run: Run, folder: Path, expert_size: int) -> dict[str, Any]:
    """Save a step, change the weights, load it; return what is whole again, on rank 0."""
    with training(run, folder, expert_size) as trainer:
        trainer.step(2)
        place = folder / "checkpoint-2"
        trainer.optimizer.step()
        return _load(trainer, place)


def load_only(run: Run, folder: Path, expert_size: int) -> dict[str, Any]:
    """Load a checkpoint that another number of processes wrote."""
    with training(run, folder, expert_size) as trainer:
        return _load(trainer, folder / "checkpoint-2")


def _load(trainer: Training, place: Path) -> dict[str, Any]:
    trainer._load_from_checkpoint(str(place))
    trainer._load_optimizer_and_scheduler(str(place))
    if trainer.mesh is None:
        whole = gathering.Whole(trainer.model.state_dict(), trainer.optimizer.state_dict())
    else:
        whole = gathering.gather_whole(trainer.model, trainer.optimizer, trainer.mesh)
    return {
        "adapters": {n: t for n, t in whole.model.items() if "lora_" in n},
        "optimizer": whole.optimizer["state"],
        "dtypes": {n: p.dtype for n, p in trainer.model.named_parameters() if "lora_" in n},
    }


def fail_while_saving(where: str, which: int, run: Run, folder: Path, told: Path) -> str:
    """Save one checkpoint, and fail while saving the next; return this rank's error."""
    sys.stderr = (told / f"{dist.get_rank()}.txt").open("w", buffering=1)
    rank, joined, seal = dist.get_rank(), [], checkpoints.seal
    join = gathering._join

    def kill_at(moment: str) -> None:
        if where == moment and rank == which and (folder / "checkpoint-2").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    def join_or_die(*given: Any) -> Any:
        joined.append(None)
        if len(joined) % 7 == 0:
            kill_at("gathering")
        return join(*given)

    def die_or_seal(made: Path) -> None:
        kill_at("writing")
        seal(made)

    try:
        with (
            watch_ranks(20.0, silence_seconds=2.0, beat_seconds=0.2),
            mock.patch.object(gathering, "_join", join_or_die),
            mock.patch.object(checkpoints, "seal", die_or_seal),
            training(run, folder, 2) as trainer,
        ):
            trainer.step(2)
            trainer.step(4)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def compare(which: int | None, name: str) -> str:
    """Compare tensors of which rank `which` has others; experts are shared by pairs of ranks."""
    mesh, rank = mesh_of(4, 2), dist.get_rank()
    tensors = {"a": torch.ones(3), "own": torch.full((2,), float(mesh.expert_rank))}
    if rank == which:
        tensors[name] = tensors[name] + 1
    try:
        with mock.patch.object(world, "_mesh", mesh):
            world.check_replicas(tensors, 7, {"own"})
    except Exception as error:
        return f"{error}"
    return "none"
