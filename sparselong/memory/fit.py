"""What fits on a GPU: the longest sequence, what to change if a config does not fit, what to keep.

A prediction may be off by 5 %. Automatic decisions leave that margin; reports show the prediction
itself.
"""

from __future__ import annotations

from sparselong.config import Config
from sparselong.memory.shape import ModelShape
from sparselong.memory.table import format_bytes
from sparselong.memory.training import GIB, Device, Kept, finetune_memory

CARD_BYTES = int(23.6 * GIB)
"""Usable memory of a 24 GB card, for which plans are made if no GPU is named."""
MARGIN = 1.05
"""Factor by which a measured peak may exceed the predicted one."""
STEP_TOKENS = 128
"""Granularity of the sequence lengths that are tried, in tokens."""


def is_kept(asked: str, peak_bytes: int, budget_bytes: int) -> bool:
    """Return whether to keep something: `always`, or with `auto` if peak and margin fit."""
    return asked == "always" or (asked == "auto" and peak_bytes * MARGIN <= budget_bytes)


def kept_peaks(
    shape: ModelShape, config: Config, device: Device = "cuda", *, sharded: bool = False
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
        key: finetune_memory(shape, config, device, sharded=sharded, kept=both).peak_bytes
        for key, both in kept.items()
    }


def decide_kept(
    shape: ModelShape,
    config: Config,
    budget_bytes: int,
    device: Device = "cuda",
    *,
    sharded: bool = False,
) -> Kept:
    """Return what layers keep on a device with `budget_bytes` of usable memory."""
    nothing = config.nothing_to_keep(device)
    return Kept(
        *(
            key not in nothing and is_kept(getattr(config.training, key), peak, budget_bytes)
            for key, peak in kept_peaks(shape, config, device, sharded=sharded).items()
        )
    )


def least_peak_bytes(
    shape: ModelShape, config: Config, budget_bytes: int, device: Device = "cuda"
) -> int:
    """Return the predicted peak of stage 03 on a device with `budget_bytes` of usable memory."""
    kept = decide_kept(shape, config, budget_bytes, device)
    return finetune_memory(shape, config, device, kept=kept).peak_bytes


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
        then the sequence lengths that fit without and with all of them. Empty if the config fits
        as it is or nothing helps.
    """
    peak = least_peak_bytes(shape, config, budget_bytes, device)
    if peak <= budget_bytes:
        return []
    texts, together = [], config
    for text, changed in _alternatives(config):
        less = least_peak_bytes(shape, changed, budget_bytes, device)
        if less < peak:
            outcome = "fits" if less <= budget_bytes else "is not enough by itself"
            texts.append(f"{text} saves {format_bytes(peak - less)} and {outcome}")
            together = _merge(together, config, changed)
    longest = largest_sequence_len(shape, config, budget_bytes, device)
    if longest:
        texts.append(f"sequence_len={longest} instead of {config.sequence_len} fits")
    longer = largest_sequence_len(shape, together, budget_bytes, device)
    if longer > longest and len(texts) > (longest > 0):
        texts.append(f"with all other changes, sequence_len={longer} fits")
    return texts


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
            "micro_batch_size": min(config.micro_batch_size, changed.micro_batch_size),
        }
    )


def _alternatives(config: Config) -> list[tuple[str, Config]]:
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
    return found
