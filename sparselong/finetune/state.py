"""What a checkpoint must hold besides Axolotl's own files: masks, scales and the run's counters.

Axolotl and transformers save A and B (adapter_model.safetensors), optimizer, scheduler, random
state and trainer_state.json. The masks and scales in use go beside them into masks.safetensors, the
counters into progress.json, both before trainer_state.json, which is written last: a checkpoint
whose trainer_state.json reads and names its own step is whole, any other is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sparselong.checkpoint import write_tensors
from sparselong.errors import StageError
from sparselong.files import write_atomically
from sparselong.provenance import read_peaks

if TYPE_CHECKING:  # the stage's own process needs no PEFT, whose import takes seconds
    from sparselong.adapters import MaskedLoraLinear

MASKS = "masks.safetensors"
PROGRESS = "progress.json"
TRAINER_STATE = "trainer_state.json"
_NEEDED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    MASKS,
    PROGRESS,
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
)


@dataclass
class Progress:
    """Counters of a training run that outlive a restart."""

    tokens: int = 0
    """Real tokens (no padding) trained on so far."""
    alerted: bool = False
    """Whether the loss target's alert has been given."""
    mask_updates: list[dict[str, Any]] = field(default_factory=list)
    """Step and fraction of mask bits flipped, overall and by kind of layer."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Peak memory by device, of the processes that led here."""
    data_ranks: int = 1
    """Sequences that were trained on side by side: they decide what is in a step."""

    def note_peaks(self) -> dict[str, int]:
        """Takes in this process's peaks and returns the highest so far."""
        for device, count in read_peaks().items():
            self.peak_bytes[device] = max(count, self.peak_bytes.get(device, 0))
        return self.peak_bytes


def write(directory: Path, layers: Mapping[str, MaskedLoraLinear], progress: Progress) -> None:
    """Writes masks, scales and counters into a checkpoint directory."""
    write_tensors(directory / MASKS, buffers(layers))
    progress.note_peaks()
    write_atomically(directory / PROGRESS, json.dumps(asdict(progress)) + "\n")


def read(directory: Path, layers: Mapping[str, MaskedLoraLinear], data_ranks: int = 1) -> Progress:
    """Restores masks and scales from a checkpoint directory and returns its counters.

    Raises:
        StageError: a file is damaged, belongs to other layers or to a run with another number of
            sequences in a step.
    """
    here = buffers(layers)
    try:
        stored = load_file(directory / MASKS)
        progress = Progress(**json.loads((directory / PROGRESS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise _unusable(directory, str(error)) from error
    wanted = {name: tensor.shape for name, tensor in here.items()}
    if {name: tensor.shape for name, tensor in stored.items()} != wanted:
        raise _unusable(directory, f"masks of {len(stored)} tensors where {len(wanted)} are due")
    if progress.data_ranks != data_ranks:
        raise StageError(
            f"checkpoint {directory} was trained with another number of sequences side by side",
            f"{progress.data_ranks} times sequence_parallel_degree processes",
            f"{data_ranks} times as many",
            "go on with that number; each sequence may be split over more or fewer processes",
        )
    for name, tensor in here.items():
        tensor.copy_(stored[name])
    return progress


def is_whole(checkpoint: Path) -> bool:
    """Whether a `checkpoint-N` directory was written to its end."""
    if not all((checkpoint / name).is_file() for name in _NEEDED):
        return False
    try:
        state = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return state.get("global_step") == step_of(checkpoint)


def step_of(checkpoint: Path) -> int:
    """N of `checkpoint-N`."""
    return int(checkpoint.name.rpartition("-")[2])


def buffers(layers: Mapping[str, MaskedLoraLinear]) -> dict[str, torch.Tensor]:
    """Masks and scales in use, by name."""
    found = {}
    for name, layer in layers.items():
        for part, tensor in (("weight_mask", layer.patterns), ("weight_scale", layer.scale)):
            if tensor is not None:
                found[f"{name}.{part}"] = tensor
    return found


def _unusable(directory: Path, found: str) -> StageError:
    return StageError(
        f"checkpoint {directory} cannot be used",
        f"{MASKS} and {PROGRESS} of this model's masked layers",
        found,
        f"delete {directory} to go on from the checkpoint before it",
    )
