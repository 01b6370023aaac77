"""The table of stages: which earlier stages each reads, and which config keys decide its result.

A stage's hash covers the config sections that it and the stages it reads depend on, so that
changing a training key leaves a compressed model valid and changing a compression key does not.
Keys that decide no result (config.keys.Incidental) are in no hash: they may change when a run
continues. Whether a stage is up to date depends on the stages it reads and on no other.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparselong.config import Config, hash_sections


@dataclass(frozen=True)
class Declaration:
    """What a stage depends on.

    Attributes:
        reads: earlier stages whose results it opens; they must be done first.
        sections: top-level config keys that decide its result, beside those of what it reads.
    """

    reads: tuple[str, ...]
    sections: tuple[str, ...]


STAGES: dict[str, Declaration] = {
    "01_health": Declaration((), tuple(Config.model_fields)),
    "02_compress": Declaration(
        (),
        (
            *("seed", "model", "shared_dense", "experts", "calibration", "data"),
            *("flash_attention", "attention_backend", "deterministic"),
        ),
    ),
    "03_finetune": Declaration(
        ("02_compress",),
        ("sequence_len", "micro_batch_size", "lora", "finetuning_modifiers", "training"),
    ),
    "04_eval": Declaration(("02_compress", "03_finetune"), ("evaluation",)),
}


def deciding_sections(name: str) -> set[str]:
    """Return the top-level keys that decide a stage's result, directly or by what it reads."""
    sections = set(STAGES[name].sections)
    for earlier in STAGES[name].reads:
        sections |= deciding_sections(earlier)
    return sections


def stage_hash(config: Config, name: str) -> str:
    """Return the hash of the config keys that decide the stage's result."""
    return hash_sections(config, deciding_sections(name))
