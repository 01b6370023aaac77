"""Stage 03's memory with experts held in each way, which way is chosen, and why.

How checkpointed layers compute is settled for each way on its own, and explained for the chosen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from sparselong.config import Config
from sparselong.figures import format_bytes
from sparselong.memory import placing
from sparselong.memory.limits import check_experts
from sparselong.memory.shape import ModelShape, drop_experts
from sparselong.memory.storage import Held
from sparselong.memory.training import Device, Kept, Memory


class Ways(NamedTuple):
    """Stage 03's memory with experts held in each way, and what stages 03 and 04 choose."""

    replicated: Memory
    sharded: Memory | None
    hosted: Memory | None
    held: Held
    held_reason: str
    settled: Config
    evaluation_held: Held


def plan_ways(
    shape: ModelShape,
    config: Config,
    card_bytes: int,
    device: Device,
    host_budget_bytes: int | None,
) -> Ways:
    """Plan stage 03 in each way for the fewest processes that the config needs.

    Args:
        shape: sizes of the base model, with all its experts.
        config: the config of the run.
        card_bytes: usable memory of each device.
        device: kind of the devices.
        host_budget_bytes: available host memory; None: not known, taken as enough.

    Raises:
        ConfigError: `expert_parallel_degree` does not divide the number of experts.
    """
    check_experts(config, shape)
    base, shape = shape, drop_experts(shape, config)
    processes = placing.planned_processes(config)
    given = (shape, config, processes, card_bytes, device, host_budget_bytes)
    held = placing.decide_held(*given)
    settled = placing.settle(*given[:2], held, *given[2:])
    # Replicated experts do not change how many processes there are.
    given_to_memory = (shape, config, card_bytes, device)
    replicated = placing.decided_memory(*given_to_memory, host_budget_bytes=host_budget_bytes)
    replicated = replace(replicated, devices=processes)

    def plan(held: Held | None) -> Memory | None:
        if held is None:
            return None
        memory = placing.decided_memory(
            *given_to_memory, held=held, host_budget_bytes=host_budget_bytes
        )
        return replace(memory, devices=max(memory.devices, processes))

    ways = list_ways(shape, config, held, device)
    return Ways(
        replicated,
        plan(ways["sharded"]),
        plan(ways["hosted"]),
        held,
        explain_held(shape, config, held, replicated.peak_bytes, card_bytes),
        settled,
        placing.decide_evaluation_held(base, *given[1:]),
    )


def list_ways(
    shape: ModelShape, config: Config, held: Held, device: Device
) -> dict[str, Held | None]:
    """Return how experts are held in each column of a plan; None: the config does not allow it.

    Args:
        shape: sizes of the base model.
        config: the config of the run.
        held: the way that is chosen.
        device: kind of the devices.
    """
    processes, most = placing.planned_processes(config), _most_shared(shape, config)
    candidates = placing.list_candidates(shape, config, processes, device)
    on_host = [each for each in candidates if each.placement == "host"]
    return {
        "replicated": Held(),
        "sharded": Held(most) if most > 1 else None,
        "hosted": held if held in on_host else next(iter(on_host), None),
    }


def _most_shared(shape: ModelShape, config: Config) -> int:
    """Return how many processes share experts in a plan, also if the config does not share."""
    asked = config.expert_parallel_degree
    if asked != "auto" and asked > 1:
        return asked
    return placing.most_expert_parallel(shape, config, placing.planned_processes(config))


def explain_held(
    shape: ModelShape, config: Config, held: Held, replicated_bytes: int, card_bytes: int
) -> str:
    """Return why experts and vocabulary are held as they are.

    Args:
        shape: sizes of the base model.
        config: the config of the run.
        held: how they are held.
        replicated_bytes: the stage's peak on a device if each holds all.
        card_bytes: usable memory of the device.
    """
    processes, most = placing.planned_processes(config), _most_shared(shape, config)
    asked = {
        "expert_parallel_degree": config.expert_parallel_degree,
        "experts.placement": config.experts.placement,
    }
    given = ", ".join(f"{key}: {value}" for key, value in asked.items() if value != "auto")
    if held.placement == "host" and config.experts.placement == "auto":
        least = "shared on the GPUs" if held.expert_parallel > 1 else "on the GPU"
        text = f"auto: the experts do not fit with a margin {least}"
    elif config.expert_parallel_degree != "auto":
        return given
    elif processes == 1:
        text = "auto: one process holds them all"
    elif config.training.keep_experts == "always":
        text = "auto: training.keep_experts: always needs all of them on each GPU"
    elif most == 1:
        text = f"auto: {processes} processes cannot share the experts evenly"
    elif held.placement == "host":
        text = "auto: the more processes share them, the fewer bytes each copies"
    else:
        fits = held.expert_parallel == 1
        outcome = "fits" if fits else "does not fit with a margin"
        peak, card = format_bytes(replicated_bytes), format_bytes(card_bytes)
        text = f"auto: replicated, {peak} of {card}, {outcome}"
    return f"{given}; {text}" if given else text


def describe_layers(settled: Config) -> str:
    """Return how checkpointed layers compute: rows at once, where inputs wait, which attention."""
    training = settled.training
    if not training.gradient_checkpointing:
        return "not checkpointed"
    rows, offloads = training.slice_rows, training.offload_checkpoints is True
    parts = [f"{rows:,} tokens at a time" if isinstance(rows, int) else "all tokens at once"]
    parts.append(f"inputs {'in host memory' if offloads else 'on the device'}")
    if settled.attention_backend != "auto":
        parts.append(f"{settled.attention_backend} attention")
    return ", ".join(parts)


def describe_kept(kept: Kept, shape: ModelShape) -> str:
    """Return which outputs layers keep for the backward pass, and in which; empty: none."""
    outputs = {
        "full attention": (shape.full_layers if kept.attention else 0, shape.full_layers),
        "experts' gate_up": (kept.experts, shape.layers),
    }
    return ", ".join(
        f"{name} in {count_layers(*counts)}" for name, counts in outputs.items() if counts[0]
    )


def count_layers(kept: int, layers: int) -> str:
    """Return in how many of a number of layers something is kept: the last ones."""
    if kept == layers:
        return f"all {layers} layers"
    return f"the last {kept} of {layers} layers" if kept > 1 else f"the last of {layers} layers"


def explain_layers(config: Config, settled: Config) -> str:
    """Return why checkpointed layers compute as they do.

    Args:
        config: the config of the run.
        settled: the same from `placing.settle`.
    """
    if not config.training.gradient_checkpointing:
        return "training.gradient_checkpointing: false"
    keys = {
        "training.slice_rows": (config.training.slice_rows, settled.training.slice_rows),
        "training.offload_checkpoints": (
            config.training.offload_checkpoints,
            settled.training.offload_checkpoints,
        ),
        "attention_backend": (config.attention_backend, settled.attention_backend),
    }
    given = [f"{key}: {str(asked).lower()}" for key, (asked, _) in keys.items() if asked != "auto"]
    changed = any(
        asked == "auto" and chosen not in ("auto", "never", False)
        for asked, chosen in keys.values()
    )
    if len(given) < len(keys):
        given.append(f"auto: {'needed to fit with a margin' if changed else 'the fastest way'}")
    return ", ".join(given)


def expert_host_bytes(shape: ModelShape, config: Config, ways: Ways) -> int:
    """Return the host memory of the stage that needs most for experts there; 0 if none are.

    Args:
        shape: sizes of the base model, with all its experts.
        config: the config of the run.
        ways: how stages 03 and 04 hold experts.
    """
    processes, kept = placing.planned_processes(config), drop_experts(shape, config)
    stages = ((kept, ways.settled, ways.held), (shape, config, ways.evaluation_held))
    return max(
        placing.host_bytes(*stage, processes) if stage[2].placement == "host" else 0
        for stage in stages
    )
