"""What a process keeps and holds: outputs of layers, and experts, shared or whole, and where.

What layers keep for the backward pass saves time. Attention's outputs come first, because they save
more per byte; then the experts', of as many layers as fit.

Layers are fastest where they compute all rows at once, with their inputs on the GPU. Copies of
inputs to host memory run beside the computation, so `auto` tries them first where memory does not
suffice. Slices of rows come next: they cost a few percent. Attention in our Triton kernels, which
need no fp32 sums, comes last: other backends may be faster by a third.

Experts are fastest where each process holds all of them on its GPU: nothing is exchanged. The next
best is to share experts and vocabulary. If that does not fit either, the experts go to host memory,
from which layers are copied ahead of their use, each process its own: the more share them, the
fewer bytes each copies. An embedding that is not shared goes there with them. A prediction may be
off by 5 %: automatic decisions leave that margin.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from sparselong.config import Config
from sparselong.memory.shape import ModelShape
from sparselong.memory.slicing import AUTO_ROWS, host_input_bytes
from sparselong.memory.stages import evaluation_memory
from sparselong.memory.storage import WHOLE, Held, embedding_host_bytes, expert_bytes
from sparselong.memory.training import (
    GIB,
    Device,
    Kept,
    Memory,
    finetune_memory,
    process_tokens,
)

MARGIN = 1.05
"""Factor by which a measured peak may exceed the predicted one."""
PROCESS_BYTES = 2 * GIB
"""Host memory of a process on a GPU for Python, libraries and file buffers (estimate)."""


def decide_kept(
    shape: ModelShape,
    config: Config,
    budget_bytes: int,
    device: Device = "cuda",
    *,
    held: Held = WHOLE,
) -> Kept:
    """Return what layers keep on a device with `budget_bytes` of usable memory.

    With `auto` that is what fits with the margin: attention's outputs, then those of the experts of
    as many layers as possible.
    """
    nothing = config.nothing_to_keep(device, held.expert_parallel)

    def is_open(key: str) -> bool:
        return key not in nothing and getattr(config.training, key) == "auto"

    def make_memory(kept: Kept) -> Memory:
        return finetune_memory(shape, config, device, held=held, kept=kept)

    def needed_bytes(kept: Kept) -> float:
        return make_memory(kept).peak_bytes * MARGIN

    kept = make_memory(always_kept(shape, config)).kept
    if is_open("keep_attention"):
        kept = kept._replace(attention=needed_bytes(kept._replace(attention=True)) <= budget_bytes)
    if is_open("keep_experts"):  # by bisection: the peak grows with the number of layers
        counts = [kept._replace(experts=layers) for layers in range(1, shape.layers + 1)]
        kept = kept._replace(experts=bisect_right(counts, budget_bytes, key=needed_bytes))
    return kept


def always_kept(shape: ModelShape, config: Config) -> Kept:
    """Return what the config says that layers keep, whether it fits or not."""
    attention, experts = (
        getattr(config.training, key) == "always" for key in ("keep_attention", "keep_experts")
    )
    return Kept(attention, shape.layers if experts else 0)


def decided_memory(
    shape: ModelShape,
    config: Config,
    budget_bytes: int,
    device: Device = "cuda",
    *,
    held: Held = WHOLE,
    processes_here: int | None = None,
    host_budget_bytes: int | None = None,
) -> Memory:
    """Return the memory of stage 03 as it computes and what it keeps on a device with a budget.

    Args:
        shape: sizes of the base model.
        config: the config of the run.
        budget_bytes: usable memory of each device.
        device: kind of the devices.
        held: how the process holds the experts.
        processes_here: number of processes on this machine; None: the fewest.
        host_budget_bytes: available host memory; None: not known, taken as enough.
    """
    here = processes_here or planned_processes(config)
    config = settle(shape, config, held, here, budget_bytes, device, host_budget_bytes)
    kept = decide_kept(shape, config, budget_bytes, device, held=held)
    return finetune_memory(shape, config, device, held=held, kept=kept)


def settle(
    shape: ModelShape,
    config: Config,
    held: Held,
    processes_here: int,
    budget_bytes: int,
    device: Device = "cuda",
    host_budget_bytes: int | None = None,
) -> Config:
    """Return the config with `auto` replaced in what says how checkpointed layers compute.

    These are `training.slice_rows`, `training.offload_checkpoints` and `attention_backend`, whose
    `auto` remains unless it must be `triton`. It is the fastest way that fits with the margin; if
    none does, the one that needs least.

    Args:
        shape: sizes of the base model.
        config: the config of the run.
        held: how the process holds the experts.
        processes_here: number of processes on this machine.
        budget_bytes: usable memory of each device.
        device: kind of the devices.
        host_budget_bytes: available host memory; None: not known, taken as enough.
    """

    def is_possible(way: Config) -> bool:
        if host_budget_bytes is None or way.training.offload_checkpoints is not True:
            return True
        return host_bytes(shape, way, held, processes_here) <= host_budget_bytes

    ways = _list_layers(config, device)
    least, settled = math.inf, ways[0]
    for way in filter(is_possible, ways):
        kept = always_kept(shape, way)
        peak = finetune_memory(shape, way, device, held=held, kept=kept).peak_bytes
        if peak * MARGIN <= budget_bytes:
            return way
        if peak < least:
            least, settled = peak, way
    return settled


def _list_layers(config: Config, device: Device) -> list[Config]:
    """Return the config with each way of computing layers that it allows, the fastest first."""
    training = config.training
    asked = training.slice_rows, training.offload_checkpoints, config.attention_backend
    rows = ["never", AUTO_ROWS] if asked[0] == "auto" else [asked[0]]
    offloads = [False, True] if asked[1] == "auto" else [asked[1]]
    backends = [asked[2]]
    if device == "cuda" and asked[2] == "auto" and config.flash_attention:
        backends.append("triton")
    if device == "cpu" or not training.gradient_checkpointing or training.keep_experts == "always":
        rows, offloads = rows[:1], offloads[:1]
    if process_tokens(config) <= AUTO_ROWS:
        rows = rows[:1]
    return [
        config.model_copy(
            update={
                "attention_backend": backend,
                "training": training.model_copy(
                    update={"slice_rows": count, "offload_checkpoints": offload}
                ),
            }
        )
        for backend in backends
        for count in rows
        for offload in offloads
    ]


def planned_processes(config: Config) -> int:
    """Return the fewest processes of one machine with which stage 03 can run."""
    degree = config.expert_parallel_degree
    return math.lcm(config.sequence_parallel_degree, 1 if degree == "auto" else degree)


def most_expert_parallel(shape: ModelShape, config: Config, processes_here: int) -> int:
    """Return the largest number of this machine's processes that can share experts under `auto`.

    It divides the processes, the experts, and those that `experts.keep` leaves. It is 1 if
    `training.keep_experts` is `always`, which needs all experts on each GPU.
    """
    if config.training.keep_experts == "always":
        return 1
    return math.gcd(processes_here, shape.experts, config.experts.keep or 0)


def host_bytes(shape: ModelShape, config: Config, held: Held, processes_here: int) -> int:
    """Return the host memory of stage 03's processes on a machine, if anything of theirs is there.

    It is that of their experts and embedding, of their layers' inputs, and of the processes
    themselves.
    """
    copies = processes_here // held.expert_parallel if held.placement == "host" else 0
    sequences = max(1, processes_here // config.sequence_parallel_degree)
    offloaded = sequences * host_input_bytes(shape, config)
    each = expert_bytes(shape) + embedding_host_bytes(shape, held)
    return copies * each + offloaded + processes_here * PROCESS_BYTES


def list_candidates(
    shape: ModelShape,
    config: Config,
    processes_here: int,
    device: Device = "cuda",
    host_budget_bytes: int | None = None,
) -> list[Held]:
    """Return how the config allows to hold the experts, the fastest first.

    With `experts.placement: auto`, host memory is among them only on a GPU, and if it suffices.

    Args:
        shape: sizes of the base model.
        config: the config of the run.
        processes_here: number of processes on this machine.
        device: kind of the devices.
        host_budget_bytes: available host memory; None: not known, taken as enough.
    """
    degree, placement = config.expert_parallel_degree, config.experts.placement
    if degree == "auto":
        most = most_expert_parallel(shape, config, processes_here)
        degrees = [1] if most == 1 else [1, most]
    else:
        degrees = [degree]
    on_gpu = [Held(each, "gpu") for each in degrees]
    on_host = [Held(each, "host") for each in reversed(degrees)]
    if placement == "gpu" or (placement == "auto" and device == "cpu"):
        return on_gpu
    if placement == "host":
        return on_host
    if host_budget_bytes is not None:
        on_host = [
            held
            for held in on_host
            if host_bytes(shape, config, held, processes_here) <= host_budget_bytes
        ]
    return [*on_gpu, *on_host]


def decide_held(
    shape: ModelShape,
    config: Config,
    processes_here: int,
    budget_bytes: int,
    device: Device = "cuda",
    host_budget_bytes: int | None = None,
) -> Held:
    """Return how stage 03's processes hold experts and vocabulary: the fastest way that fits.

    The choice does not mean that fine-tuning fits: see `check_fit`.

    Args:
        shape: as for `list_candidates`, like all that is not named here.
        config: likewise.
        processes_here: likewise.
        budget_bytes: usable memory of each device.
        device: likewise.
        host_budget_bytes: likewise.
    """

    def peak_bytes(held: Held) -> int:
        more: dict[str, Any] = {"held": held, "processes_here": processes_here}
        more["host_budget_bytes"] = host_budget_bytes
        return decided_memory(shape, config, budget_bytes, device, **more).peak_bytes

    candidates = list_candidates(shape, config, processes_here, device, host_budget_bytes)
    return _decide(candidates, budget_bytes, peak_bytes)


def decide_evaluation_held(
    shape: ModelShape,
    config: Config,
    processes_here: int,
    budget_bytes: int,
    device: Device = "cuda",
    host_budget_bytes: int | None = None,
) -> Held:
    """Return the same for stage 04, by its memory. Arguments: see `decide_held`."""

    def peak_bytes(held: Held) -> int:
        return sum(evaluation_memory(shape, config, device, held).values())

    candidates = list_candidates(shape, config, processes_here, device, host_budget_bytes)
    return _decide(candidates, budget_bytes, peak_bytes)


def _decide(candidates: list[Held], budget_bytes: int, peak_bytes: Callable[[Held], int]) -> Held:
    """Return the first candidate that fits with the margin.

    If none does, it is the smallest one of the first place that exceeds the memory by less than the
    planner's error, or else of the last place.
    """
    for held in candidates:
        if peak_bytes(held) * MARGIN <= budget_bytes:
            return held
    smallest: dict[str, Held] = {}
    for held in candidates:
        smallest[held.placement] = max(held, smallest.get(held.placement, held))
    for held in smallest.values():
        if peak_bytes(held) <= budget_bytes * MARGIN:
            return held
    return [*smallest.values()][-1]
