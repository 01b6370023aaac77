"""What stage 04's process hands to the ranks that measure models together. Needs no torch.

The ranks know no tasks, tokenizers or data: they get tokens, and answer with likelihoods. The file
is written once, before they start, and is the same for all of them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from sparselong.files import load_json, write_atomically
from sparselong.run import Stage

WORK = "work.json"
MEMORY_FIX = (
    "lower evaluation.batch_size, or share experts and vocabulary among more processes "
    "(expert_parallel_degree)"
)
"""What helps if a GPU runs out of memory while a model is measured."""


class Request(NamedTuple):
    """Tokens of a text; the likelihood of the last `scored` of them is wanted."""

    tokens: list[int]
    scored: int


@dataclass(frozen=True)
class Work:
    """What the ranks measure.

    Attributes:
        run_dir: the run's directory; its config.yaml has the settings.
        models: name, directory and fingerprint of each model.
        requests: those of all tasks.
        samples: tokens of each conversation, and which of them are supervised.
    """

    run_dir: str
    models: list[tuple[str, str, str]]
    requests: list[Request]
    samples: list[tuple[list[int], list[bool]]]

    def write(self, path: Path) -> None:
        """Write the work to a file."""
        write_atomically(path, json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Work:
        """Return the work that `write` wrote."""
        found = load_json(path)
        return cls(**{**found, "requests": [Request(*each) for each in found["requests"]]})

    def digest(self, name: str) -> str:
        """Return a hash of what a model is and of what it is measured on."""
        (fingerprint,) = (mark for model, _, mark in self.models if model == name)
        text = json.dumps([fingerprint, self.requests, self.samples])
        return hashlib.sha256(text.encode()).hexdigest()


def scores_path(folder: Path, model: str) -> Path:
    """Return the file in which rank 0 leaves a model's likelihoods."""
    return folder / f"{model}.scores.json"


def rank_arguments(stage: Stage) -> list[str]:
    """Return the Python arguments that run a rank of the stage."""
    return ["-m", "sparselong.evaluate.rank", str(stage.dir / WORK)]
