"""What stage 03's planner says of a case of fit_120b.py, which computes as it decides."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sparselong.config import Config, load
from sparselong.memory import (
    PUBLISHED,
    Held,
    Kept,
    decide_kept,
    finetune_memory,
    rows_at_once,
    settle,
)

CONFIG = Path(__file__).resolve().parent.parent / "configs/gpt-oss-120b-4x3090.yaml"
CAP_BYTES = int(23.6 * 2**30)
EXPERT_LORA = (
    "lora.expert_targets=[gate_up_proj, down_proj]",
    "lora.expert_r=8",
    "lora.expert_dtype=bfloat16",
    "lora.router=true",
    "training.optimizer=adamw_bnb_8bit",
)
SHAPES = {"whole": (4, 128, 201_088), "half": (2, 64, 100_544), "tiny": (2, 8, 4_096)}
"""GPUs, experts and vocabulary."""
LAYERS = ("training.slice_rows", "training.offload_checkpoints", "attention_backend")
"""Keys of the config that say how checkpointed layers compute, and keys of a case."""


def plan(case: dict[str, Any]) -> dict[str, int]:
    """Return what stage 03's planner says of a case: the peak, and bytes by component."""
    shape, config = describe(case)
    kept = Kept(case["keep_attention"] == "always")
    made = finetune_memory(shape, config, held=held_in(case), kept=kept)
    components = {f"planned_bytes: {name}": size for name, size in made.components.items()}
    return {"planned_bytes": made.peak_bytes, **components}


def settle_layers(case: dict[str, Any]) -> dict[str, Any]:
    """Return how stage 03 would let checkpointed layers compute within the cap, by key."""
    shape, config = describe(case)
    settled = settle(shape, config, held_in(case), case["gpus"], CAP_BYTES)
    training = settled.training
    chosen = (training.slice_rows, training.offload_checkpoints, settled.attention_backend)
    return dict(zip(LAYERS, chosen, strict=True))


def rows_of(case: dict[str, Any]) -> int | None:
    """Return how many of a GPU's tokens its layers compute at once; None: torch's checkpoints."""
    return rows_at_once(describe(case)[1], -(-case["tokens"] // case["degree"]))


def keeps_attention(case: dict[str, Any]) -> bool:
    """Return whether stage 03 would keep full attention's output within the cap."""
    return decide_kept(*describe(case), CAP_BYTES, held=held_in(case)).attention


def held_in(case: dict[str, Any]) -> Held:
    """Return how a case's processes hold the experts; the first results have no placement."""
    return Held(case["gpus"], case.get("placement", "gpu"))


def describe(case: dict[str, Any]) -> tuple[Any, Config]:
    """Return a case's shape and config, as the planner takes them.

    The first results do not say how layers compute: all tokens at once, inputs on the GPU.
    """
    overrides = [f"sequence_len={case['tokens']}", f"sequence_parallel_degree={case['degree']}"]
    overrides += ["lora.r=16", *(EXPERT_LORA if case["arm"] == "experts" else ())]
    overrides += [f"{key}={str(case[key]).lower()}" for key in LAYERS if key in case]
    _, experts, vocab = SHAPES[case["shape"]]
    layers = {"layers": case["layers"], "full_layers": case["layers"] // 2}
    published = PUBLISHED["openai/gpt-oss-120b"]
    shape = dataclasses.replace(published, experts=experts, vocab=vocab, **layers)
    return shape, load(CONFIG, overrides)
