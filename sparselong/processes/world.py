"""This process's rank among the processes that train together, and their exchanges.

`join` is called once, before Axolotl is imported; `mesh()` is None if one process trains alone.

After joining, the environment no longer names other processes. Axolotl, transformers and accelerate
then train as if alone: they do not wrap the model in DDP, give each process different samples,
rescale the loss or gather anything. finetune/masked_trainer.py does all communication between
ranks, and only rank 0 writes.

Every rank must reach the same exchange within a timeout; processes/watch.py ends ranks that do not,
and names them. Work that only rank 0 does (tokenize, write a checkpoint) may take long. The other
ranks wait for it in a separate process group, which the watch does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from sparselong.errors import StageError
from sparselong.parallel import Mesh, all_gather, build_mesh, explain_exchange
from sparselong.processes.launch import hide_launcher
from sparselong.processes.watch import watch_ranks

EXCHANGE_SECONDS = 600
"""How long a rank waits for the others in a step."""
_SILENCE_SECONDS = 120.0
"""How long a busy rank may write no heartbeat."""
_PATIENCE = timedelta(days=24)
"""How long a rank waits for work, as in an idle chat. As milliseconds it fits 32 bits."""
_mesh: Mesh | None = None
_was_joined = False
_watch = ExitStack()


def connect() -> None:
    """Find the other ranks, named by torchrun's environment variables.

    Ranks can then collect values, for example to decide how to `join`.
    """
    # Small CPU tensors are sent over gloo even on machines with GPUs.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)


def join(
    context_size: int, expert_size: int = 1, exchange_seconds: float = EXCHANGE_SECONDS
) -> Mesh:
    """Join the other ranks, and remove torchrun's environment variables.

    Args:
        context_size: number of ranks that share a sequence.
        expert_size: number of ranks that share experts and vocabulary.
        exchange_seconds: timeout of an exchange. The backend's own timeout is twice as long,
            because its error would name no rank.

    Returns:
        This process's place in the mesh.
    """
    global _mesh, _was_joined
    if not dist.is_initialized():
        connect()
    timeout = timedelta(seconds=2 * exchange_seconds)
    _mesh = build_mesh(context_size, timeout, expert_size=expert_size)
    hide_launcher()
    _was_joined = True
    return _mesh


def watched(
    tell: Callable[[StageError], None], exchange_seconds: float = EXCHANGE_SECONDS
) -> ExitStack:
    """Return a block in which another rank's failure ends this one; `leave` ends the watch early.

    Args:
        tell: called with the failure if this rank is stuck and must exit.
        exchange_seconds: as for `join`.
    """
    _watch.enter_context(watch_ranks(exchange_seconds, _SILENCE_SECONDS, tell=tell))
    return _watch


def mesh() -> Mesh | None:
    """Return this process's place in the mesh, or None before `join`."""
    return _mesh


def was_joined() -> bool:
    """Return whether this process has joined others, whom the environment no longer names."""
    return _was_joined


def leave() -> None:
    """Leave the process group once every rank has finished its last exchange."""
    global _mesh
    if _mesh is not None:
        wait_for_all()
        _watch.close()
        dist.destroy_process_group()
        _mesh = None


def count() -> int:
    """Return the number of processes that train together."""
    return 1 if _mesh is None else dist.get_world_size()


def is_first() -> bool:
    """Return whether this process is rank 0, the only one that writes."""
    return _mesh is None or dist.get_rank() == 0


def wait_for_all() -> None:
    """Wait until every rank has called this, however long that takes."""
    if _mesh is not None:
        explain_exchange("waiting", lambda: dist.all_reduce(torch.zeros(1)))


@contextmanager
def first_alone() -> Iterator[None]:
    """Run the block on rank 0, then on the other ranks."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


def collect(value: object) -> list:
    """Gather every rank's value, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[object] = [None] * dist.get_world_size()
    explain_exchange("collecting", lambda: dist.all_gather_object(values, value))
    return values


def merge_peaks(peaks: dict[str, int]) -> dict[str, int]:
    """Return the peak bytes of all ranks by device.

    Each rank sees its own GPU as `cuda:0`, which becomes `cuda:RANK`; `host` is the maximum over
    processes.

    Args:
        peaks: this rank's peak bytes by device.
    """
    merged: dict[str, int] = {}
    for rank, each in enumerate(collect(peaks)):
        for device, size_bytes in each.items():
            name = f"cuda:{rank}" if device.startswith("cuda") and _mesh else device
            merged[name] = max(size_bytes, merged.get(name, 0))
    return merged


def holds_first_replica() -> bool:
    """Return whether no lower rank holds the same experts as this process."""
    return _mesh is None or dist.get_rank(_mesh.replica_group) == 0


def check_replicas(
    tensors: Mapping[str, torch.Tensor], step: int, sharded: Container[str] = ()
) -> None:
    """Raise unless ranks that hold the same adapters, masks and scales have the same fingerprints.

    Every rank computes them from the same values; they are never sent. Without this check a rank
    that diverged would keep training unnoticed, because only rank 0 logs and writes.

    Args:
        tensors: the trained tensors by name, in the same order on every rank.
        step: the optimizer step, for the message.
        sharded: names of those that are compared only with the ranks that hold the same experts.

    Raises:
        StageError: on every rank, naming the ranks that differ from the first one that holds the
            same, and the first such tensor.
    """
    if _mesh is None:
        return
    mine = torch.stack([_fingerprint(tensor) for tensor in tensors.values()])
    prints = [each.tolist() for each in all_gather(mine, _mesh.world_group, "replica check")]
    others = []
    for rank, each in enumerate(prints):
        firsts = (rank % _mesh.expert_size if name in sharded else 0 for name in tensors)
        models = (prints[first][place] for place, first in enumerate(firsts))
        differing = [n for n, a, b in zip(tensors, each, models, strict=True) if a != b]
        if differing:
            others.append((rank, differing[0]))
    if others:
        raise StageError(
            f"the ranks' adapters or masks differ at step {step}",
            "the same values on every rank that holds them",
            f"different values on rank {', '.join(str(rank) for rank, _ in others)}, first in "
            f"{min((name for _, name in others), key=list(tensors).index)}",
            "run the same command again; if it happens again, a GPU may be faulty: use other GPUs",
        )


@torch.no_grad()
def _fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Return an int64 scalar: the sum of the tensor's bytes as 8-byte integers, modulo 2^64."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    return torch.nn.functional.pad(data, (0, -len(data) % 8)).view(torch.int64).sum()
