"""What fits on a GPU, and what to change if a config does not fit.

A prediction may be off by 5 %. Automatic decisions leave that margin (placing.py); reports show the
prediction itself.
"""

from __future__ import annotations

from sparselong.config import Config
from sparselong.errors import StageError
from sparselong.figures import format_bytes
from sparselong.memory.placing import (
    MARGIN,
    always_kept,
    decide_held,
    decided_memory,
    host_bytes,
    most_expert_parallel,
    planned_processes,
    settle,
)
from sparselong.memory.shape import ModelShape
from sparselong.memory.storage import Held
from sparselong.memory.training import GIB, Device, finetune_memory

CARD_BYTES = int(23.6 * GIB)
"""Usable memory of a 24 GB card, for which plans are made if no GPU is named."""
MOST_GPUS = 8
"""Largest number of GPUs that is suggested."""
STEP_TOKENS = 128
"""Granularity of the sequence lengths that are tried, in tokens."""


def least_peak_bytes(
    shape: ModelShape,
    config: Config,
    budget_bytes: int,
    device: Device = "cuda",
    host_budget_bytes: int | None = None,
) -> int:
    """Return what stage 03 needs on devices with `budget_bytes` of usable memory.

    It is the predicted peak without what layers keep under `auto`, which never takes more than is
    left.
    """
    limits = (planned_processes(config), budget_bytes, device, host_budget_bytes)
    held = decide_held(shape, config, *limits)
    settled = settle(shape, config, held, *limits)
    kept = always_kept(shape, config)
    return finetune_memory(shape, settled, device, held=held, kept=kept).peak_bytes


def check_fit(
    shape: ModelShape,
    config: Config,
    processes_here: int,
    budget_bytes: int,
    device: Device = "cuda",
    host_budget_bytes: int | None = None,
) -> None:
    """Raise if stage 03 cannot fit, before anything is loaded.

    What exceeds the device's memory by less than the planner's error margin is not refused.
    Arguments: see `decide_held`.

    Raises:
        StageError: says how many bytes each device, or the host, lacks, and which changes would
            help.
    """
    limits = (processes_here, budget_bytes, device, host_budget_bytes)
    held = decide_held(shape, config, *limits)
    settled = settle(shape, config, held, *limits)
    check_host(shape, settled, held, processes_here, host_budget_bytes)
    memory = decided_memory(shape, settled, budget_bytes, device, held=held)
    if memory.peak_bytes <= budget_bytes * MARGIN:
        return
    whose = "each process" if device == "cpu" else "each GPU"
    found = (
        f"{format_bytes(memory.peak_bytes)} by the plan, with experts and vocabulary "
        f"{describe_held(held, whose)}: {format_bytes(memory.peak_bytes - budget_bytes)} short"
    )
    if held.placement == "gpu" and config.experts.placement == "auto" and device == "cuda":
        assert host_budget_bytes is not None  # else the last choice would be host memory
        needed = host_bytes(shape, config, held._replace(placement="host"), processes_here)
        found += (
            f"; with the experts in host memory {format_bytes(needed)} there, available "
            f"{format_bytes(host_budget_bytes)}"
        )
    changes = suggest_changes(shape, config, budget_bytes, device, host_budget_bytes)
    raise StageError(
        f"fine-tuning {config.model.base} does not fit in memory",
        f"at most {format_bytes(budget_bytes)} on {whose}",
        found,
        "; ".join(add_last_resort(changes)),
    )


def describe_held(held: Held, whose: str) -> str:
    """Return how experts and vocabulary are held, as part of a sentence."""
    degree = held.expert_parallel
    how = f"shared by {degree} processes" if degree > 1 else f"whole on {whose}"
    return how + ", the experts in host memory" * (held.placement == "host")


def check_host(
    shape: ModelShape,
    config: Config,
    held: Held,
    processes_here: int,
    host_budget_bytes: int | None,
) -> None:
    """Raise if experts or layers' inputs cannot be in this machine's host memory.

    Args:
        shape: sizes of the base model.
        config: the config of the run, settled.
        held: how the experts are held.
        processes_here: number of processes on this machine.
        host_budget_bytes: available host memory; None: not known, taken as enough.

    Raises:
        StageError: says how many bytes are needed, and how many there are.
    """
    offloads = config.training.offload_checkpoints is True
    needed = host_bytes(shape, config, held, processes_here)
    is_unused = held.placement == "gpu" and not offloads
    if is_unused or host_budget_bytes is None or needed <= host_budget_bytes:
        return
    copies = processes_here // held.expert_parallel
    parts, fixes = [], []
    if held.placement == "host":
        parts.append(f"{copies} cop{'y' if copies == 1 else 'ies'} of the experts")
        most = most_expert_parallel(shape, config, processes_here)
        fixes += [f"expert_parallel_degree={most}"] if most > held.expert_parallel else []
        fixes.append("experts.placement=gpu on larger or more GPUs")
    if offloads:
        parts.append("the inputs of their layers")
        fixes.append("training.offload_checkpoints=false")
    what = "the experts" if held.placement == "host" else "the inputs of checkpointed layers"
    raise StageError(
        f"host memory does not hold {what} of {config.model.base}",
        f"{format_bytes(needed)} available on this machine for {processes_here} processes with "
        f"{' and '.join(parts)}",
        f"{format_bytes(host_budget_bytes)}: {format_bytes(needed - host_budget_bytes)} short",
        f"close other programs, add memory, set {', or '.join(fixes)}, or use a smaller model",
    )


def add_last_resort(changes: list[str]) -> list[str]:
    """Return `suggest_changes`' texts, and what else to do if none of them is enough."""
    if any(text.endswith(" fits") for text in changes):
        return changes
    last = "no change of the config is enough: use a larger GPU or a smaller model"
    return [*changes, last]


def largest_sequence_len(
    shape: ModelShape,
    config: Config,
    budget_bytes: int,
    device: Device = "cuda",
    host_budget_bytes: int | None = None,
) -> int:
    """Return the longest sequence in tokens whose fine-tuning fits the budget on one device.

    It is a multiple of 128 and at most `sequence_len`; 0 if no length fits.
    """

    def fits(blocks: int) -> bool:
        shorter = config.model_copy(update={"sequence_len": blocks * STEP_TOKENS})
        peak = least_peak_bytes(shape, shorter, budget_bytes, device, host_budget_bytes)
        return peak <= budget_bytes

    low, high = 0, config.sequence_len // STEP_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * STEP_TOKENS


def suggest_changes(
    shape: ModelShape,
    config: Config,
    budget_bytes: int,
    device: Device = "cuda",
    host_budget_bytes: int | None = None,
) -> list[str]:
    """Return changes that make stage 03 fit, the cheapest first.

    Args:
        shape: sizes of the base model.
        config: the config of the run.
        budget_bytes: usable memory of each device.
        device: kind of the devices.
        host_budget_bytes: available host memory; None: not known, taken as enough.

    Returns:
        For each single `key=value`, a text saying how much it saves and whether that is enough;
        then the sequence length that fits without them and, if none of them is enough, with all of
        them; then the smallest number of GPUs sharing a sequence that is enough. Empty if the
        config fits as it is or nothing helps.
    """
    limits = (budget_bytes, device, host_budget_bytes)
    peak = least_peak_bytes(shape, config, *limits)
    if peak <= budget_bytes:
        return []
    texts, together = [], config
    for text, changed in _alternatives(shape, config, host_budget_bytes):
        less = least_peak_bytes(shape, changed, *limits)
        if less < peak:
            outcome = "fits" if less <= budget_bytes else "is not enough by itself"
            texts.append(f"{text} saves {format_bytes(peak - less)} and {outcome}")
            together = _merge(together, config, changed)
    one_is_enough = any(text.endswith(" fits") for text in texts)
    longest = largest_sequence_len(shape, config, *limits)
    if longest:
        texts.append(f"sequence_len={longest} instead of {config.sequence_len} fits")
    longer = largest_sequence_len(shape, together, *limits)
    if longer > longest and len(texts) > (longest > 0) and not one_is_enough:
        texts.append(f"with all other changes, sequence_len={longer} fits")
    if device == "cuda":
        texts += _more_processes(shape, config, peak, budget_bytes, host_budget_bytes)
    return texts


def _more_processes(
    shape: ModelShape,
    config: Config,
    peak_bytes: int,
    budget_bytes: int,
    host_budget_bytes: int | None,
) -> list[str]:
    """Return the smallest `sequence_parallel_degree` up to MOST_GPUS that is enough, as a text."""
    degree = 2 * config.sequence_parallel_degree
    while degree <= MOST_GPUS:
        more = {"sequence_parallel_degree": degree}
        changed = config.model_copy(update=more)
        less = least_peak_bytes(shape, changed, budget_bytes, "cuda", host_budget_bytes)
        if less <= budget_bytes:
            saved = format_bytes(peak_bytes - less)
            return [f"sequence_parallel_degree={degree} on {degree} GPUs saves {saved} and fits"]
        degree *= 2
    return []


def _merge(config: Config, before: Config, changed: Config) -> Config:
    """Return `config` with the values in which `changed` differs from `before`."""
    training = {
        name: value for name, value in changed.training if value != getattr(before.training, name)
    }
    return config.model_copy(
        update={
            "training": config.training.model_copy(update=training),
            "attention_backend": changed.attention_backend
            if changed.attention_backend != before.attention_backend
            else config.attention_backend,
            "expert_parallel_degree": changed.expert_parallel_degree
            if changed.expert_parallel_degree != before.expert_parallel_degree
            else config.expert_parallel_degree,
            "experts": changed.experts if changed.experts != before.experts else config.experts,
            "micro_batch_size": min(config.micro_batch_size, changed.micro_batch_size),
        }
    )


def _alternatives(
    shape: ModelShape, config: Config, host_budget_bytes: int | None
) -> list[tuple[str, Config]]:
    """Return single changes that save memory, each as override and config."""
    training = config.training
    found = []

    def change(text: str, **values: object) -> None:
        section = training.model_copy(update=values)
        found.append((text, config.model_copy(update={"training": section})))

    if not training.gradient_checkpointing:
        change("training.gradient_checkpointing=true", gradient_checkpointing=True)
    else:
        for key in ("keep_experts", "keep_attention"):
            if getattr(training, key) == "always":
                change(f"training.{key}=auto", **{key: "auto"})
        if training.offload_checkpoints is False:
            change("training.offload_checkpoints=auto", offload_checkpoints="auto")
        if training.slice_rows == "never":
            change("training.slice_rows=auto", slice_rows="auto")
    if config.flash_attention and config.attention_backend not in ("auto", "triton"):
        other = config.model_copy(update={"attention_backend": "triton"})
        found.append(("attention_backend=triton", other))
    if config.micro_batch_size > 1:
        text = "micro_batch_size=1 with more gradient_accumulation_steps"
        found.append((text, config.model_copy(update={"micro_batch_size": 1})))
    if config.experts.placement == "gpu":
        section = config.experts.model_copy(update={"placement": "host"})
        other = config.model_copy(update={"experts": section})
        processes = planned_processes(config)
        held = decide_held(shape, other, processes, 0)
        needed = host_bytes(shape, other, held, processes)
        if host_budget_bytes is None or needed <= host_budget_bytes:
            found.append(("experts.placement=host", other))
    most = most_expert_parallel(shape, config, planned_processes(config))
    if config.expert_parallel_degree != "auto" and config.expert_parallel_degree < most:
        more = config.model_copy(update={"expert_parallel_degree": most})
        found.append((f"expert_parallel_degree={most}", more))
    return found
