"""Save and restore masks, scales and the run's counters with Axolotl's checkpoints.

Axolotl and transformers save A and B (adapter_model.safetensors), optimizer, scheduler, random
state and trainer_state.json. We add the current masks and scales in masks.safetensors and the
counters in progress.json. checkpoints.py records and checks that a checkpoint is whole.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sparselong.checkpoint import write_tensors
from sparselong.errors import StageError
from sparselong.files import load_json, write_atomically
from sparselong.finetune.checkpoints import MASKS, PROGRESS
from sparselong.provenance import read_peaks

if TYPE_CHECKING:  # the stage's process needs no PEFT, whose import takes seconds
    from sparselong.adapters import MaskedLoraLinear


@dataclass
class Progress:
    """Counters of a training run that survive a restart."""

    tokens: int = 0
    """Tokens (without padding) trained on so far."""
    stopped: dict[str, Any] | None = None
    """`step` and `reason` if training was ended before its last step."""
    lowest_loss: float | None = None
    """The last validation loss that was an improvement (watching/stopping.py)."""
    waited: int = 0
    """Evaluations since then."""
    tracker: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    """The run's name for trackers, which a resumed run keeps."""
    mask_updates: list[dict[str, Any]] = field(default_factory=list)
    """Step and fraction of mask bits flipped, overall and by kind of layer, of each update."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Peak memory by device, over all processes of this run so far."""
    data_ranks: int = 1
    """Number of data ranks, which determines the sequences of a step."""

    def note_peaks(self) -> dict[str, int]:
        """Merge this process's peaks, and return the highest so far by device."""
        for device, count in read_peaks().items():
            self.peak_bytes[device] = max(count, self.peak_bytes.get(device, 0))
        return self.peak_bytes


def write(directory: Path, layers: Mapping[str, MaskedLoraLinear], progress: Progress) -> None:
    """Write masks, scales and counters into a checkpoint directory."""
    write_tensors(directory / MASKS, buffers(layers))
    progress.note_peaks()
    write_atomically(directory / PROGRESS, json.dumps(asdict(progress)) + "\n")


def read(directory: Path, layers: Mapping[str, MaskedLoraLinear], data_ranks: int = 1) -> Progress:
    """Restore masks and scales from a checkpoint directory, and return its counters.

    Args:
        directory: the checkpoint directory.
        layers: the masked layers by name; modified in place.
        data_ranks: the run's number of data ranks.

    Raises:
        StageError: a file is damaged, or belongs to other layers or another number of data ranks.
    """
    here = buffers(layers)
    try:
        stored = load_file(directory / MASKS)
        progress = Progress(**load_json(directory / PROGRESS))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise _unusable(directory, str(error)) from error
    wanted = {name: tensor.shape for name, tensor in here.items()}
    if {name: tensor.shape for name, tensor in stored.items()} != wanted:
        raise _unusable(
            directory, f"{len(stored)} tensors that do not match the {len(wanted)} expected"
        )
    if progress.data_ranks != data_ranks:
        raise StageError(
            f"checkpoint {directory} was trained with another number of data ranks",
            f"{progress.data_ranks} times sequence_parallel_degree processes",
            f"{data_ranks} times sequence_parallel_degree processes",
            "resume with the expected number; sequence_parallel_degree itself may change",
        )
    for name, tensor in here.items():
        tensor.copy_(stored[name])
    return progress


def buffers(layers: Mapping[str, MaskedLoraLinear]) -> dict[str, torch.Tensor]:
    """Return the current masks and scales by name."""
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
        f"move {directory} away: the same command then passes it over",
    )
