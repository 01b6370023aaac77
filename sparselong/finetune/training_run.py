"""The run that a trainer works on, found by its directory: config, folders, files. No torch.

The stage's process and its trainers (rank.py, axolotl_plugin.py, masked_trainer.py) have nothing in
common but the run directory. Its config.yaml is the one place where a trainer reads a config value;
axolotl.yaml only repeats what Axolotl itself must know.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparselong.config import Config, load
from sparselong.processes import find_world
from sparselong.run import Stage, read_manifest

METRICS, SUPERVISION = "metrics.jsonl", "supervision.txt"
RECEIPT, BAKED, TRAINED = "receipt.json", "baked.json", "trained.json"
AXOLOTL_YAML = "axolotl.yaml"
RUN_KEY = "sparselong_run"
"""The key of axolotl.yaml that names the run directory: all that our plugin is told."""
_COMPRESS, _FINETUNE = "02_compress", "03_finetune"
# Not `-m axolotl.cli.main`: to save conversations, datasets starts four processes, which import the
# main module again where there is one, and this one takes seconds.
_AXOLOTL = "from axolotl.cli.main import main; main()"


@dataclass(frozen=True)
class TrainingRun:
    """A run whose model is trained.

    Attributes:
        directory: absolute, as Axolotl may change the current directory.
        config: the run's config.
    """

    directory: Path
    config: Config

    @classmethod
    def open(cls, directory: Path) -> TrainingRun:
        """Return the run of a directory, with the config that its config.yaml holds."""
        return cls(directory, load(directory / "config.yaml"))

    @classmethod
    def of_stage(cls, stage: Stage) -> TrainingRun:
        """Return the run of stage 03 at work."""
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
        """Stage 02's name of its checkpoint."""
        manifest = read_manifest(self.directory, _COMPRESS)
        assert manifest is not None, "stage 03 begins once stage 02 is done"
        return manifest["metrics"]["name"]

    @property
    def work(self) -> Path:
        """`runs/NAME/03_finetune`."""
        return self.directory / _FINETUNE

    @property
    def checkpoints(self) -> Path:
        """Axolotl's output directory, with `checkpoint-N/` in it."""
        return self.work / "checkpoints"

    def is_trained(self) -> bool:
        """Return whether training has come to its end and only the result is to be written."""
        return (self.work / TRAINED).exists()


def trainer_arguments(stage: Stage) -> list[str]:
    """Return the arguments of Python that train a rank of the stage by its axolotl.yaml."""
    path = str(stage.dir / AXOLOTL_YAML)
    if find_world(stage.config).size > 1:
        return ["-m", "sparselong.finetune.rank", path]
    return ["-c", _AXOLOTL, "train", path, "--launcher", "python"]
