"""Find the processes that train together, and those that this one starts. Needs no torch.

    python 0N_stage.py              one process, or `sequence_parallel_degree` on this machine
    torchrun ... 0N_stage.py        the processes that torchrun (or accelerate) started, on one or
                                    several machines; a multiple of the degree, else data parallel

Either way each rank trains in its own process, separate from the stage's (process.py). Under
torchrun only the first process runs the stage: it locks, prepares, writes and publishes. The other
processes wait until it reports that training begins, then start their rank's trainer (follow.py).
All machines must share the file system of the run directory.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from sparselong.config import Config
from sparselong.errors import ConfigError

WORLD_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        size: number of processes.
        local: local rank (number on this machine) of each rank that this process starts.
        here: number of processes on this machine.
        joined: whether torchrun started this process and the others.
    """

    size: int
    local: dict[int, int]
    here: int
    joined: bool


def joined_rank() -> int | None:
    """Return this process's rank if torchrun started several processes, else None."""
    return int(os.environ["RANK"]) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def find_world(config: Config) -> World:
    """Return the processes that the config and torchrun's environment variables specify.

    Raises:
        ConfigError: torchrun's number of processes is not a multiple of sequence_parallel_degree.
    """
    degree, rank = config.sequence_parallel_degree, joined_rank()
    if rank is None:
        return World(degree, {rank: rank for rank in range(degree)}, degree, joined=False)
    size = int(os.environ["WORLD_SIZE"])
    if size % degree:
        raise ConfigError(
            f"{size} processes cannot form groups of {degree} (this is rank {rank})",
            f"a multiple of sequence_parallel_degree: {degree} processes",
            f"WORLD_SIZE={size}",
            f"torchrun --nproc_per_node={degree}, or another sequence_parallel_degree",
        )
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    return World(size, {rank: int(os.environ["LOCAL_RANK"])}, here, joined=True)


def rank_environments(world: World, gpus: int) -> dict[int, dict[str, str]]:
    """Return the environment variables to set for each started rank.

    Each rank sees only its own GPU. So does a single process, because transformers' trainer would
    spread a model over all visible GPUs.

    Args:
        world: the processes that train together.
        gpus: number of GPUs that this process can use; 0 on a CPU machine.
    """
    made = {rank: _share_of_machine(local, world, gpus) for rank, local in world.local.items()}
    if world.size > 1 and not world.joined:
        port = str(_free_port())
        for rank, local in world.local.items():
            made[rank] |= {
                **{"RANK": str(rank), "WORLD_SIZE": str(world.size)},
                **{"LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(world.size)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            }
    return made


def _share_of_machine(local: int, world: World, gpus: int) -> dict[str, str]:
    share = {}
    if world.size > 1 and not world.joined and "OMP_NUM_THREADS" not in os.environ:
        share["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // world.size))
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else [str(number) for number in range(gpus)]
        share["CUDA_VISIBLE_DEVICES"] = names[local]
    return share


def _free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]
