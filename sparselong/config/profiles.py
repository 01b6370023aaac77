"""Profiles: named sets of defaults, overridden by the config file and the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparselong.config.schema import Config

PROFILES: dict[str, dict[str, Any]] = {
    "quick_test": {
        "calibration.samples": 16,
        "training.max_steps": 20,
        "training.gradient_accumulation_steps": 1,
        "training.eval_steps": 10,
        "training.save_steps": 10,
        "evaluation.limit": 100,
        "evaluation.perplexity_samples": 32,
    },
    "standard": {},
    "high_quality": {
        "calibration.samples": 512,
        "lora.r": 64,
        "lora.alpha": 128.0,
        "training.num_epochs": 3.0,
        "training.learning_rate": 1e-4,
    },
    "memory_efficient": {
        "lora.r": 8,
        "lora.alpha": 16.0,
        "sequence_len": 4096,
        "training.optimizer": "adamw_bnb_8bit",
    },
}
"""Defaults by profile, as dotted keys."""


def describe_profile(config: Config) -> list[dict[str, Any]]:
    """Return each key that the config's profile sets: `key`, `profile`, `default` and `used`.

    What is used differs from the profile's value if the file or the command line set the key.
    """
    defaults = type(config)()
    return [
        {"key": key, "profile": value, "default": _get(defaults, key), "used": _get(config, key)}
        for key, value in PROFILES[config.profile].items()
    ]


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
