"""What fits on a GPU: what to keep and what to share, and what to change if a config does not fit.

Replicated experts and vocabulary need no exchange and are therefore faster. They are shared only if
fine-tuning would not otherwise fit, or if the config says so. A prediction may be off by 5 %.
Automatic decisions leave that margin; reports show the prediction itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from sparselong.config import Config
from sparselong.errors import StageError
from sparselong.memory.shape import ModelShape
from sparselong.memory.stages import evaluation_memory
from sparselong.memory.table import format_bytes
from sparselong.memory.training import GIB, Device, Kept, Memory, finetune_memory

CARD_BYTES = int(23.6 * GIB)
"""Usable memory of a 24 GB card, for which plans are made if no GPU is named."""
MARGIN = 1.05
"""Factor by which a measured peak may exceed the predicted one."""
MOST_GPUS = 8
"""Largest number of GPUs that is suggested."""
STEP_TOKENS = 128
"""Granularity of the sequence lengths that are tried, in tokens."""


def is_kept(asked: str, peak_bytes: int, budget_bytes: int) -> bool:
    """Return whether to keep something: `always`, or with `auto` if peak and margin fit."""
    return asked == "always" or (asked == "auto" and peak_bytes * MARGIN <= budget_bytes)


def kept_peaks(
    shape: ModelShape, config: Config, device: Device = "cuda", *, expert_parallel: int = 1
) -> dict[str, int]:
    """Return the predicted peak with each output that layers can keep, by its key in `training`.

    Attention's outputs come first because they save more time per byte. The peak for the experts'
    outputs therefore includes them unless they are `never` kept, and the peak for attention's
    includes the experts' outputs only if these are `always` kept.
    """
    training = config.training
    kept = {
        "keep_attention": Kept(True, training.keep_experts == "always"),
        "keep_experts": Kept(training.keep_attention != "never", True),
    }
    return {
        key: finetune_memory(
            shape, config, device, expert_parallel=expert_parallel, kept=both
        ).peak_bytes
        for key, both in kept.items()
    }


def decide_kept(
    shape: ModelShape,
    config: Config,
    budget_bytes: int,
    device: Device = "cuda",
    *,
    expert_parallel: int = 1,
) -> Kept:
    """Return what layers keep on a device with `budget_bytes` of usable memory."""
    nothing = config.nothing_to_keep(device, expert_parallel)
    peaks = kept_peaks(shape, config, device, expert_parallel=expert_parallel)
    return Kept(
        *(
            key not in nothing and is_kept(getattr(config.training, key), peak, budget_bytes)
            for key, peak in peaks.items()
        )
    )


def decided_memory(
    shape: ModelShape,
    config: Config,
    budget_bytes: int,
    device: Device = "cuda",
    *,
    expert_parallel: int = 1,
) -> Memory:
    """Return the memory of stage 03 with what it keeps on a device with `budget_bytes`."""
    kept = decide_kept(shape, config, budget_bytes, device, expert_parallel=expert_parallel)
    return finetune_memory(shape, config, device, expert_parallel=expert_parallel, kept=kept)


def planned_processes(config: Config) -> int:
    """Return the fewest processes of one machine with which stage 03 can run."""
    degree = config.expert_parallel_degree
    return math.lcm(config.sequence_parallel_degree, 1 if degree == "auto" else degree)


def most_expert_parallel(shape: ModelShape, config: Config, processes_here: int) -> int:
    """Return the largest number of this machine's processes that can share experts under `auto`.

    It divides both the processes and the experts. It is 1 if `training.keep_experts` is `always`,
    which needs all experts on each GPU.
    """
    if config.training.keep_experts == "always":
        return 1
    return math.gcd(processes_here, shape.experts)


def decide_expert_parallel(
    shape: ModelShape,
    config: Config,
    processes_here: int,
    budget_bytes: int,
    device: Device = "cuda",
) -> int:
    """Return how many processes share one copy of experts and vocabulary in stage 03.

    That is `expert_parallel_degree` if it is a number. With `auto` it is 1, which needs no
    exchange, if fine-tuning then fits with a margin, and otherwise the largest number possible.
    The choice does not mean that fine-tuning fits: see `check_fit`.

    Args:
        shape: sizes of the base model.
        config: the config of the run.
        processes_here: number of processes on this machine.
        budget_bytes: usable memory of each device.
        device: kind of the devices.
    """

    def fits_replicated() -> bool:
        peak = decided_memory(shape, config, budget_bytes, device).peak_bytes
        return peak * MARGIN <= budget_bytes

    return _decide(shape, config, processes_here, fits_replicated)


def decide_evaluation_parallel(
    shape: ModelShape,
    config: Config,
    processes_here: int,
    budget_bytes: int,
    device: Device = "cuda",
) -> int:
    """Return how many processes share one copy of experts and vocabulary in stage 04.

    Arguments and rule are those of `decide_expert_parallel`, with stage 04's memory.
    """

    def fits_replicated() -> bool:
        peak = sum(evaluation_memory(shape, config, device).values())
        return peak * MARGIN <= budget_bytes

    return _decide(shape, config, processes_here, fits_replicated)


def _decide(
    shape: ModelShape, config: Config, processes_here: int, fits_replicated: Callable[[], bool]
) -> int:
    degree = config.expert_parallel_degree
    if degree != "auto":
        return degree
    most = most_expert_parallel(shape, config, processes_here)
    return 1 if most == 1 or fits_replicated() else most


def least_peak_bytes(
    shape: ModelShape, config: Config, budget_bytes: int, device: Device = "cuda"
) -> int:
    """Return the predicted peak of stage 03 on devices with `budget_bytes` of usable memory."""
    processes = planned_processes(config)
    shared = decide_expert_parallel(shape, config, processes, budget_bytes, device)
    memory = decided_memory(shape, config, budget_bytes, device, expert_parallel=shared)
    return memory.peak_bytes


def check_fit(
    shape: ModelShape,
    config: Config,
    processes_here: int,
    budget_bytes: int,
    device: Device = "cuda",
) -> None:
    """Raise if stage 03 cannot fit, before anything is loaded.

    What exceeds the memory by less than the planner's error margin is not refused.
    Arguments: see `decide_expert_parallel`.

    Raises:
        StageError: says how many bytes each device lacks, and which changes would help.
    """
    shared = decide_expert_parallel(shape, config, processes_here, budget_bytes, device)
    memory = decided_memory(shape, config, budget_bytes, device, expert_parallel=shared)
    if memory.peak_bytes <= budget_bytes * MARGIN:
        return
    whose = "each process" if device == "cpu" else "each GPU"
    how = f"shared by {shared} processes" if shared > 1 else f"whole on {whose}"
    raise StageError(
        f"fine-tuning {config.model.base} does not fit in memory",
        f"at most {format_bytes(budget_bytes)} on {whose}",
        f"{format_bytes(memory.peak_bytes)} by the plan, with experts and vocabulary {how}: "
        f"{format_bytes(memory.peak_bytes - budget_bytes)} short",
        "; ".join(add_last_resort(suggest_changes(shape, config, budget_bytes, device))),
    )


def add_last_resort(changes: list[str]) -> list[str]:
    """Return `suggest_changes`' texts, and what else to do if none of them is enough."""
    if any(text.endswith(" fits") for text in changes):
        return changes
    last = "no change of the config is enough: use a larger GPU or a smaller model"
    return [*changes, last]


def largest_sequence_len(
    shape: ModelShape, config: Config, budget_bytes: int, device: Device = "cuda"
) -> int:
    """Return the longest sequence in tokens whose fine-tuning fits the budget on one device.

    It is a multiple of 128 and at most `sequence_len`; 0 if no length fits.
    """

    def fits(blocks: int) -> bool:
        shorter = config.model_copy(update={"sequence_len": blocks * STEP_TOKENS})
        return least_peak_bytes(shape, shorter, budget_bytes, device) <= budget_bytes

    low, high = 0, config.sequence_len // STEP_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * STEP_TOKENS


def suggest_changes(
    shape: ModelShape, config: Config, budget_bytes: int, device: Device = "cuda"
) -> list[str]:
    """Return changes that make stage 03 fit, the cheapest first.

    Returns:
        For each single `key=value`, a text saying how much it saves and whether that is enough;
        then the sequence length that fits without them and, if none of them is enough, with all of
        them; then the smallest number of GPUs sharing a sequence that is enough. Empty if the
        config fits as it is or nothing helps.
    """
    peak = least_peak_bytes(shape, config, budget_bytes, device)
    if peak <= budget_bytes:
        return []
    texts, together = [], config
    for text, changed in _alternatives(shape, config):
        less = least_peak_bytes(shape, changed, budget_bytes, device)
        if less < peak:
            outcome = "fits" if less <= budget_bytes else "is not enough by itself"
            texts.append(f"{text} saves {format_bytes(peak - less)} and {outcome}")
            together = _merge(together, config, changed)
    one_is_enough = any(text.endswith(" fits") for text in texts)
    longest = largest_sequence_len(shape, config, budget_bytes, device)
    if longest:
        texts.append(f"sequence_len={longest} instead of {config.sequence_len} fits")
    longer = largest_sequence_len(shape, together, budget_bytes, device)
    if longer > longest and len(texts) > (longest > 0) and not one_is_enough:
        texts.append(f"with all other changes, sequence_len={longer} fits")
    if device == "cuda":
        texts += _more_processes(shape, config, budget_bytes, peak)
    return texts


def _more_processes(
    shape: ModelShape, config: Config, budget_bytes: int, peak_bytes: int
) -> list[str]:
    """Return the smallest `sequence_parallel_degree` up to MOST_GPUS that is enough, as a text."""
    degree = 2 * config.sequence_parallel_degree
    while degree <= MOST_GPUS:
        more = {"sequence_parallel_degree": degree}
        less = least_peak_bytes(shape, config.model_copy(update=more), budget_bytes)
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
            "micro_batch_size": min(config.micro_batch_size, changed.micro_batch_size),
        }
    )


def _alternatives(shape: ModelShape, config: Config) -> list[tuple[str, Config]]:
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
        if not training.offload_checkpoints:
            change("training.offload_checkpoints=true", offload_checkpoints=True)
    if config.flash_attention and config.attention_backend != "triton":
        other = config.model_copy(update={"attention_backend": "triton"})
        found.append(("attention_backend=triton", other))
    if config.micro_batch_size > 1:
        text = "micro_batch_size=1 with more gradient_accumulation_steps"
        found.append((text, config.model_copy(update={"micro_batch_size": 1})))
    most = most_expert_parallel(shape, config, planned_processes(config))
    if config.expert_parallel_degree != "auto" and config.expert_parallel_degree < most:
        more = config.model_copy(update={"expert_parallel_degree": most})
        found.append((f"expert_parallel_degree={most}", more))
    return found
