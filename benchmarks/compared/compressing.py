"""One compressed model, by stage 02's own code, in a folder of its own.

Nothing of stage 02 is left out: it reads the base and the calibration rows, keeps the states of
the compressed layers, and writes checkpoint and masters; only the solver may be another. Sizes are
those of the files.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.compared.methods import METHODS, solving
from benchmarks.compared.text import CONFIG, Documents, write_calibration
from sparselong.compress import compress
from sparselong.config import CalibrationSection, Config, schema
from sparselong.run import Stage
from sparselong.run.progress import Display

STAGE = "02_compress"
REFINEMENT_STEPS = CalibrationSection().refinement_steps
_SPARE = 2
"""Calibration rows are drawn from so many times as many tokens as are used."""


class _Quiet(Display):
    """A display that shows nothing; log.txt has the lines."""

    def print(self, message: str) -> None:
        """Drop a line."""

    def show(self, what: str, done: int, total: int, note: str = "") -> str | None:
        """Drop a step."""


@dataclass(frozen=True)
class Recipe:
    """What decides a compressed model.

    Attributes:
        method: a name in METHODS.
        seed: which calibration documents are drawn, and random masks.
        experts: `native`, `2:4`, or how many of a layer's experts are kept.
    """

    method: str
    seed: int
    experts: str | int = "native"


@dataclass(frozen=True)
class Compressed:
    """A compressed model on disk.

    Attributes:
        folder: stage 02's directory.
        metrics: what its manifest would say.
        seconds: of the whole stage.
    """

    folder: Path
    metrics: dict[str, Any]
    seconds: float

    @property
    def model(self) -> Path:
        """The checkpoint."""
        return self.folder / "model"

    @property
    def masters(self) -> Path:
        """Stage 02's dense masters; there are none of bf16 projections."""
        return self.folder / "masters"


@dataclass(frozen=True)
class Compressor:
    """Compresses a base by any recipe; only the last result of each seed is kept.

    Attributes:
        base: the base checkpoint.
        documents: calibration takes training documents.
        work: folder for run directories, one for each seed.
        samples: calibration sequences.
        length: tokens of a sequence.
        kept: the last result of each seed.
    """

    base: Path
    documents: Documents
    work: Path
    samples: int
    length: int
    kept: dict[Recipe, Compressed] = field(default_factory=dict)

    @cached_property
    def _validation(self) -> Path:
        path = self.work / "validation.jsonl"
        write_calibration(path, self.documents.held_out, self.length, self.length, seed=0)
        return path

    def make(self, recipe: Recipe) -> Compressed:
        """Compress the base, or return the last result if it is of the same recipe."""
        run_dir = self.work / f"seed-{recipe.seed}"
        folder = run_dir / STAGE
        if recipe in self.kept:
            return self.kept[recipe]
        for other in [each for each in self.kept if each.seed == recipe.seed]:
            del self.kept[other]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        stage = Stage(STAGE, self._configure(recipe), run_dir, display=_Quiet())
        begin = time.monotonic()
        with solving(METHODS[recipe.method], recipe.seed):
            compress(stage)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        made = Compressed(folder, stage.metrics, time.monotonic() - begin)
        self.kept[recipe] = made
        return made

    def _configure(self, recipe: Recipe) -> Config:
        """Return the run's config, and write its calibration rows."""
        method = METHODS[recipe.method]
        rows = self.work / f"calibration-{recipe.seed}.jsonl"
        if not rows.exists():
            tokens = _SPARE * self.samples * self.length
            write_calibration(rows, self.documents.train, self.length, tokens, recipe.seed)
        experts = {
            "native": [],
            "2:4": ["experts.sparsity=2:4"],
        }.get(str(recipe.experts), [f"experts.keep={recipe.experts}"])
        given = {
            "model.base": self.base,
            "seed": recipe.seed,
            "data.train": rows,
            "data.validation": self._validation,
            "sequence_len": self.length,
            "calibration.samples": self.samples,
            "calibration.sequence_len": self.length,
            "calibration.solver": "llmcompressor" if method.solve else "sweep",
            "calibration.refinement_steps": REFINEMENT_STEPS if method.is_refined else 0,
            "shared_dense.weight_bits": method.bits,
            "shared_dense.sparsity": method.sparsity,
            "flash_attention": str(torch.cuda.is_available()).lower(),
        }
        overrides = [f"{key}={value}" for key, value in given.items()]
        return schema.load(CONFIG, [*overrides, *experts])
