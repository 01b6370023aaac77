"""This process's place among those that train together, and what they tell each other.

`join` is called once, before Axolotl is imported; `mesh()` is None where training is one process's.

After joining, the environment no longer says that there are others. Axolotl, transformers and
accelerate then train as if alone: they wrap no model in DDP, hand out no other sample to each
process, rescale no loss and gather nothing. What crosses ranks is ours, in masked_trainer.py, and
only rank 0 writes.

Every rank is at the same exchange within a time-out, and parallel.watch ends and names those that
are not. What only rank 0 does meanwhile (tokenize, write a checkpoint) may take long and is waited
for in a group of its own, which the watch does not count.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from sparselong.errors import StageError
from sparselong.parallel import Mesh, all_gather, build_mesh, explain_exchange
from sparselong.processes.launch import WORLD_VARIABLES
from sparselong.processes.watch import watch_ranks

EXCHANGE_SECONDS = 600
"""How long a rank waits for the others in a step."""
_SILENCE_SECONDS = 120.0
"""How long a rank may be so busy that it writes no sign of life."""
_PATIENCE = timedelta(days=2)
_HIDDEN = (*WORLD_VARIABLES, "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK")
_mesh: Mesh | None = None
_watch = ExitStack()


def join(context_size: int, exchange_seconds: float = EXCHANGE_SECONDS) -> Mesh:
    """Meets the other ranks, which the environment names as torchrun does, and hides them from it.

    Args:
        context_size: ranks that share a sequence.
        exchange_seconds: how long ranks may be apart. The backend's own time-out is twice as long,
            as it could name none.
    """
    global _mesh
    # Small tensors of the CPU travel over gloo even where there are GPUs.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    _mesh = build_mesh(context_size, timedelta(seconds=2 * exchange_seconds))
    for name in list(os.environ):
        if name in _HIDDEN or name.startswith("TORCHELASTIC_"):
            del os.environ[name]
    return _mesh


def watched(
    tell: Callable[[StageError], None], exchange_seconds: float = EXCHANGE_SECONDS
) -> ExitStack:
    """A block that ends with a message when another rank fails; `leave` ends the watch before.

    Args:
        tell: is given the failure when this rank is stuck and has to be ended.
        exchange_seconds: as for `join`.
    """
    _watch.enter_context(watch_ranks(exchange_seconds, _SILENCE_SECONDS, tell=tell))
    return _watch


def mesh() -> Mesh | None:
    """This process's place, once it has joined others."""
    return _mesh


def leave() -> None:
    """Ends all exchanges, once every rank is past its last one."""
    global _mesh
    if _mesh is not None:
        wait_for_all()
        _watch.close()
        dist.destroy_process_group()
        _mesh = None


def count() -> int:
    """How many processes train together."""
    return 1 if _mesh is None else dist.get_world_size()


def is_first() -> bool:
    """Whether this is the process that writes."""
    return _mesh is None or dist.get_rank() == 0


def wait_for_all() -> None:
    """Returns when every rank has called it, however long that takes."""
    if _mesh is not None:
        explain_exchange("waiting", lambda: dist.all_reduce(torch.zeros(1)))


@contextmanager
def first_alone() -> Iterator[None]:
    """The block on rank 0, and when that is through, on the others."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


def collect(value: object) -> list:
    """Every rank's value, by rank."""
    if _mesh is None:
        return [value]
    values: list[object] = [None] * dist.get_world_size()
    explain_exchange("collecting", lambda: dist.all_gather_object(values, value))
    return values


def merge_peaks(peaks: dict[str, int]) -> dict[str, int]:
    """Peak bytes by device of all ranks: each has one GPU, `cuda:0` to it; `host` is the most that
    a process had."""
    merged: dict[str, int] = {}
    for rank, each in enumerate(collect(peaks)):
        for device, size_bytes in each.items():
            name = f"cuda:{rank}" if device.startswith("cuda") and _mesh else device
            merged[name] = max(size_bytes, merged.get(name, 0))
    return merged


def check_replicas(tensors: Mapping[str, torch.Tensor], step: int) -> None:
    """That every rank holds the same adapters, masks and scales, by a fingerprint of each tensor.

    They are computed on every rank from the same numbers, never sent; a rank that had gone its own
    way would train on, and only rank 0's part would be seen.

    Raises:
        StageError: on every rank, naming those that differ from rank 0 and the first tensor.
    """
    if _mesh is None:
        return
    mine = torch.stack([_fingerprint(tensor) for tensor in tensors.values()])
    prints = [each.cpu() for each in all_gather(mine, _mesh.world_group, "replica check")]
    differ = [(each != prints[0]).tolist() for each in prints]
    others = [str(rank) for rank, marks in enumerate(differ) if any(marks)]
    if others:
        first = next(n for n, *marks in zip(tensors, *differ, strict=True) if any(marks))
        raise StageError(
            f"the ranks' adapters or masks have come apart at step {step}",
            "the same numbers on every rank as on rank 0",
            f"others on rank {', '.join(others)}, first in {first}",
            "go on from the last checkpoint with the same command; if it happens again, a GPU "
            "computes wrongly: try other ones",
        )


@torch.no_grad()
def _fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """int64 scalar: the sum of the tensor's bytes taken eight at a time, modulo 2^64."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    return torch.nn.functional.pad(data, (0, -len(data) % 8)).view(torch.int64).sum()
