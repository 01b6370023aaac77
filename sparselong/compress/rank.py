"""Compress layers on one of several ranks that share the calibration sequences.

    RANK=r WORLD_SIZE=n ... python -m sparselong.compress.rank WORK

See work.py and processes/world.py.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

from sparselong.checkpoint import Checkpoint, open_upstream
from sparselong.compress.layers import compress_layers
from sparselong.compress.work import Spread, Work, read_work
from sparselong.config import load
from sparselong.files import write_atomically
from sparselong.processes import (
    end_at_once,
    report_progress,
    tell,
    tell_failures,
    telling_memory,
    write_failure,
)
from sparselong.processes import world as ranks
from sparselong.provenance import read_peaks, reset_peaks
from sparselong.registration import set_environment
from sparselong.runtime import default_device, using

_MEMORY_FIX = "use GPUs with more memory, or shorter calibration.sequence_len"


def main(path: Path) -> None:
    """Compress the layers of the work at `path`, as the rank that the environment names."""
    set_environment()
    rank, folder = int(os.environ["RANK"]), path.parent.parent
    tell_failures(folder, rank)
    end_at_once()
    told, tokens = read_work(path)
    run_dir = Path(told["run_dir"])
    config, base = load(run_dir / "config.yaml"), Checkpoint(Path(told["base"]))
    mesh = ranks.join(1)
    reset_peaks()

    def progress(done: int, total: int, note: str) -> None:
        if ranks.is_first():
            report_progress("layer", done, total, note)

    work = Work(
        config=config,
        run_dir=run_dir,
        folder=folder,
        base=base,
        architecture=open_upstream(base),
        tokens=tokens,
        layers=range(*told["layers"]),
        spread=Spread(mesh),
        tell=tell if ranks.is_first() else lambda text: None,
        progress=progress,
        peaks=lambda: ranks.merge_peaks(read_peaks()),
    )
    passes = {"attention_backend": config.attention_backend, "deterministic": config.deterministic}
    watched = ranks.watched(partial(write_failure, folder, rank))
    with using(**passes), watched, telling_memory("while a layer was compressed", _MEMORY_FIX):
        done = compress_layers(work, default_device())
    if ranks.is_first():
        write_atomically(path, json.dumps({**told, "done": done}))
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
