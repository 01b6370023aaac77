"""The run being trained, identified by its directory: config, folders, files. Needs no torch.

The stage's process and its trainers (rank.py, axolotl_plugin.py, masked_trainer.py) share only the
run directory. Trainers read config values only from its config.yaml; axolotl.yaml just repeats what
Axolotl itself must know.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselong.checkpoint import check_recorded, take_inventory
from sparselong.config import Config, load
from sparselong.files import load_json
from sparselong.processes import find_world
from sparselong.provenance import describe_files, refuse_changes
from sparselong.run import Stage, read_manifest

METRICS, SUPERVISION, TENSORBOARD = "metrics.jsonl", "supervision.txt", "tensorboard"
RECEIPT, BAKED, TRAINED = "receipt.json", "baked.json", "trained.json"
AXOLOTL_YAML = "axolotl.yaml"
RUN_KEY = "sparselong_run"
"""The key of axolotl.yaml that names the run directory, our plugin's only parameter."""
_COMPRESS, _FINETUNE = "02_compress", "03_finetune"
# Not `-m axolotl.cli.main`: to save conversations, datasets starts four processes, each of which
# would import that main module again, which takes seconds.
# Not standalone: click would print "Aborted!" in place of an EOFError, and no traceback.
_AXOLOTL = (
    "from sparselong import set_environment; set_environment(); "
    "from axolotl.cli.main import cli; cli(standalone_mode=False)"
)


@dataclass(frozen=True)
class TrainingRun:
    """The run being trained.

    Attributes:
        directory: absolute path, because Axolotl may change the current directory.
        config: the run's config.
    """

    directory: Path
    config: Config

    @classmethod
    def open(cls, directory: Path) -> TrainingRun:
        """Return the run of a directory, with the config from its config.yaml."""
        return cls(directory, load(directory / "config.yaml"))

    @classmethod
    def of_stage(cls, stage: Stage) -> TrainingRun:
        """Return the run of a running stage 03."""
        return cls(stage.run_dir.resolve(), stage.config)

    @property
    def compressed(self) -> Path:
        """Stage 02's model."""
        return self.directory / _COMPRESS / "model"

    @property
    def masters(self) -> Path:
        """Stage 02's dense masters."""
        return self.directory / _COMPRESS / "masters"

    @property
    def compressed_name(self) -> str:
        """Stage 02's name for its checkpoint."""
        return self._compress_manifest()["metrics"]["name"]

    def _compress_manifest(self) -> dict[str, Any]:
        manifest = read_manifest(self.directory, _COMPRESS)
        assert manifest is not None, "stage 03 begins once stage 02 is done"
        return manifest

    def describe_result(self) -> list[dict[str, Any]]:
        """Return rows of `describe_files` for `model/` and `adapter/`.

        Files linked from stage 02 are not read: their hashes are in its manifest.
        """
        known = self._compress_manifest()["outputs"]
        return describe_files([self.work / "model", self.work / "adapter"], self.directory, known)

    @property
    def work(self) -> Path:
        """Stage 03's directory, `runs/NAME/03_finetune`."""
        return self.directory / _FINETUNE

    @property
    def checkpoints(self) -> Path:
        """The directory of `checkpoint-N/`."""
        return self.work / "checkpoints"

    @property
    def axolotl(self) -> Path:
        """Axolotl's output directory: what it writes besides checkpoints, which nothing reads."""
        return self.work / "axolotl"

    def is_trained(self) -> bool:
        """Return whether training is finished and only the result remains to be written."""
        return (self.work / TRAINED).exists()

    def forget_end(self, resume_from: Path | None) -> None:
        """Remove the note that training is finished unless that was at this checkpoint."""
        note = self.work / TRAINED
        if resume_from is None or (note.exists() and _newest(note) not in (None, resume_from.name)):
            note.unlink(missing_ok=True)


def _newest(note: Path) -> str | None:
    """Return the last checkpoint of a finished training; None if an earlier version noted none."""
    try:
        return load_json(note).get("newest")
    except ValueError:  # an edited note says nothing: training is looked at again
        return ""


def check_compressed(stage: Stage) -> None:
    """Raise unless stage 02's model and masters are still the files that it recorded.

    Raises:
        StageError: a file was changed, removed or added since, or the model is ambiguous.
    """
    rows = stage.manifests[_COMPRESS]["outputs"]
    run = TrainingRun.of_stage(stage)
    check_recorded(take_inventory(run.compressed), rows, _COMPRESS)
    masters = [row for row in rows if Path(row["path"]).parent.name == run.masters.name]
    refuse_changes(masters, stage.run_dir, _COMPRESS)


def trainer_arguments(stage: Stage) -> list[str]:
    """Return the Python arguments that train a rank of the stage by its axolotl.yaml."""
    path = str(stage.dir / AXOLOTL_YAML)
    if find_world(stage.config).size > 1:
        return ["-m", "sparselong.finetune.rank", path]
    return ["-c", _AXOLOTL, "train", path, "--launcher", "python"]
