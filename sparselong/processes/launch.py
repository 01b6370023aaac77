"""Find the processes that work together, and those that this one starts. Needs no torch.

    python 0N_stage.py              one process, or `sequence_parallel_degree` on this machine
    torchrun ... 0N_stage.py        the processes that torchrun (or accelerate) started, on one or
                                    several machines: stage 03 takes data ranks times the degree,
                                    as many on each machine; what shares a sequence, or experts, is
                                    on one

Either way each rank has its own process, separate from the stage's (process.py). Under
torchrun only the first process runs the stage: it locks, prepares, writes and publishes. The other
processes wait until it reports that training begins, then start their rank's trainer (follow.py).
All machines must share the file system of the run directory, which machines.py makes sure of.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from sparselong.config import Config
from sparselong.errors import ConfigError, StageError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_HIDDEN = (*_VARIABLES, "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK")
_MOST = {"WORLD_SIZE": 2**20, "MASTER_PORT": 65535}


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
    """Return this process's rank if a launcher started several processes, else None.

    Raises:
        ConfigError: a variable that torchrun sets is missing or contradicts the others.
    """
    if not os.environ.get("WORLD_SIZE") or _read("WORLD_SIZE", 1, _MOST["WORLD_SIZE"]) == 1:
        return None
    size = _read("WORLD_SIZE", 1, _MOST["WORLD_SIZE"])
    here = _read("LOCAL_WORLD_SIZE", 1, size)
    _read("LOCAL_RANK", 0, here - 1)
    _read("MASTER_PORT", 1, _MOST["MASTER_PORT"])
    if not os.environ.get("MASTER_ADDR"):
        raise _wrong("MASTER_ADDR", "the name of the machine of rank 0")
    return _read("RANK", 0, size - 1)


def _read(name: str, least: int, most: int) -> int:
    """Return an integer from the environment; raise unless it is in the range."""
    text = os.environ.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) <= most):
        raise _wrong(name, f"an integer from {least} to {most}")
    return int(text)


def _wrong(name: str, expected: str) -> ConfigError:
    names = [*_VARIABLES, "MASTER_ADDR", "MASTER_PORT"]
    found = [f"{each}={os.environ[each]}" for each in names if each in os.environ]
    return ConfigError(
        f"the environment does not describe processes that train together: {name}",
        f"{name}: {expected}",
        " ".join(found),
        "start several processes with torchrun, or one with: "
        f"env {' '.join(f'-u {each}' for each in names if each in os.environ)} python ...",
    )


def is_joined() -> bool:
    """Return whether a launcher started this process as one of several.

    False also if its variables are not valid, which `find_world` and `check_alone` explain.
    """
    try:
        return joined_rank() is not None
    except ConfigError:
        return False


def hide_launcher() -> None:
    """Remove a launcher's variables, so that no library waits for other processes."""
    for name in list(os.environ):
        if name in _HIDDEN or name.startswith("TORCHELASTIC_"):
            del os.environ[name]


def check_alone() -> None:
    """Raise if several processes were started for a stage that is one process.

    Variables that describe a single process are removed.

    Raises:
        ConfigError: they were, or the environment says so.
    """
    rank = joined_rank()
    if rank is not None:
        raise ConfigError(
            f"only stages 02, 03, 04 and 06 run in several processes (this is rank {rank})",
            "one process",
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
            "start it with python, not torchrun, and with WORLD_SIZE unset",
        )
    hide_launcher()


def find_world(config: Config) -> World:
    """Return the processes that the config and torchrun's environment variables specify.

    Raises:
        ConfigError: torchrun's variables are not valid, sequence_parallel_degree or
            expert_parallel_degree does not divide the number of processes on a machine, or --gpu
            or CUDA_VISIBLE_DEVICES names fewer GPUs than processes.
    """
    degree, rank = config.sequence_parallel_degree, joined_rank()
    if rank is None:
        _check_visible(degree)
        _check_expert_groups(config, degree, "")
        return World(degree, {rank: rank for rank in range(degree)}, degree, joined=False)
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if here % degree:
        raise ConfigError(
            f"{here} process{'es' * (here > 1)} of one machine cannot form groups of {degree} that "
            f"share a sequence (this is rank {rank})",
            f"a multiple of sequence_parallel_degree: {degree} processes on each machine",
            f"LOCAL_WORLD_SIZE={here}, WORLD_SIZE={os.environ['WORLD_SIZE']}",
            f"torchrun --nproc_per_node={degree}, or another sequence_parallel_degree",
        )
    return joined_world(config)


def _check_visible(size: int) -> None:
    """Raise ConfigError if the environment names GPUs, but fewer than processes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    if 0 < len(names) < size:
        raise ConfigError(
            f"{size} processes need {size} GPUs, one each",
            f"{size} GPUs (sequence_parallel_degree: {size})",
            f"{len(names)}: CUDA_VISIBLE_DEVICES={visible}, which --gpu sets",
            f"leave out --gpu, or pass sequence_parallel_degree={len(names)}",
        )


def evaluation_world(config: Config, gpus: int) -> World:
    """Return the processes that evaluate together.

    Any number of processes that torchrun started will do. Without torchrun there are as many as
    share a sequence in stage 03, or experts if those are more, but no more than GPUs. On a CPU
    there are several only if `expert_parallel_degree` is their number.

    Args:
        config: the config of the run.
        gpus: number of GPUs that this process can use; 0 on a CPU machine.

    Raises:
        ConfigError: as from `find_world`, except that the size may be any.
    """
    if joined_rank() is not None:
        return joined_world(config)
    shared = 1 if config.expert_parallel_degree == "auto" else config.expert_parallel_degree
    size = min(max(config.sequence_parallel_degree, shared), gpus) if gpus else shared
    _check_expert_groups(config, size, "")
    return World(size, {rank: rank for rank in range(size)}, size, joined=False)


def check_launcher(config: Config) -> None:
    """Raise if a launcher's variables are not valid, or its processes do not fit the config.

    Raises:
        ConfigError: as from `joined_rank` and `joined_world`.
    """
    if joined_rank() is not None:
        joined_world(config)


def joined_world(config: Config) -> World:
    """Return the processes that torchrun started, including this one.

    Raises:
        ConfigError: expert_parallel_degree does not divide the number of processes on a machine.
    """
    rank, here = joined_rank(), int(os.environ["LOCAL_WORLD_SIZE"])
    assert rank is not None, "torchrun started this process"
    _check_expert_groups(config, here, f" (this is rank {rank})")
    local = {rank: int(os.environ["LOCAL_RANK"])}
    return World(int(os.environ["WORLD_SIZE"]), local, here, joined=True)


def local_rank() -> int:
    """Return this process's number among those that torchrun started on its machine."""
    return 0 if joined_rank() is None else int(os.environ["LOCAL_RANK"])


def is_one_machine() -> bool:
    """Return whether all processes that torchrun started are on this machine."""
    return joined_rank() is None or os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]


def _check_expert_groups(config: Config, here: int, who: str) -> None:
    """Raise if the processes of this machine cannot form groups that share experts.

    Raises:
        ConfigError: `expert_parallel_degree` is a number that does not divide theirs.
    """
    degree = config.expert_parallel_degree
    if degree == "auto" or here % degree == 0:
        return
    divisors = ", ".join(str(n) for n in range(1, here + 1) if here % n == 0)
    raise ConfigError(
        f"{here} process{'es' * (here > 1)} of one machine cannot form groups of {degree} that "
        f"share experts{who}",
        f"expert_parallel_degree: auto, or a divisor of {here}: {divisors}",
        f"expert_parallel_degree: {degree}",
        f"set expert_parallel_degree=auto, or start a multiple of {degree} processes: "
        f"torchrun --nproc_per_node={degree} ...",
    )


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def check_cores(processes: int, gpus: int, cores: int) -> None:
    """Raise if a machine without GPUs has fewer cores than processes that train on it.

    Args:
        processes: number of processes that will train on this machine.
        gpus: number of GPUs that torch can use.
        cores: number of cores that they may use.

    Raises:
        StageError: it has; the processes would wait for each other.
    """
    if not gpus and processes > max(1, cores):
        raise StageError(
            f"this machine has too few cores for {processes} processes without GPUs",
            f"{processes} cores that this process may use (sequence_parallel_degree, or the "
            "processes that torchrun starts here)",
            f"{cores}",
            f"pass sequence_parallel_degree={cores} or less, or run on a machine with GPUs or "
            "more cores",
        )


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
        share["OMP_NUM_THREADS"] = str(max(1, usable_cores() // world.size))
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else [str(number) for number in range(gpus)]
        share["CUDA_VISIBLE_DEVICES"] = names[local]
    return share


def _free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]
