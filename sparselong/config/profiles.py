"""Profiles: named sets of defaults, overridden by the config file and the command line."""

from __future__ import annotations

from typing import Any

PROFILES: dict[str, dict[str, Any]] = {
    "quick_test": {
        "calibration.samples": 16,
        "training.max_steps": 20,
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
