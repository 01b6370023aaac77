"""Which files of a part's directory the format wrote; only these are its results. No torch.

A person may have put others there while the part was unfinished. Recorded as results, they would
be uploaded by `hub` and deleted by --force.
"""

from __future__ import annotations

from pathlib import Path

from sparselong.checkpoint import CONFIG, INDEX, take_inventory
from sparselong.export import adapter
from sparselong.export.gguf import FILE, MODELFILE
from sparselong.export.inputs import model_directory
from sparselong.files import read_json
from sparselong.run import Stage

_NAMES = {
    "adapter": (adapter.CONFIG, adapter.WEIGHTS),
    "gguf": (FILE,),
    "ollama": (FILE, MODELFILE),
    "hub": ("README.md",),
}
"""Files of the formats that are no model for transformers."""


def list_outputs(stage: Stage) -> list[Path]:
    """Return the files that a format has written, sorted.

    Args:
        stage: the part, written and verified.
    """
    names = _NAMES.get(stage.part)
    if names is None:
        shards = read_json(stage.dir / INDEX)["weight_map"].values()
        names = (CONFIG, INDEX, *{*shards}, *take_inventory(model_directory(stage)).side_files)
    return sorted(stage.dir / name for name in names)
