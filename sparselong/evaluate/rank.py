"""Measure models on one of several ranks that work together.

    RANK=r WORLD_SIZE=n ... python -m sparselong.evaluate.rank WORK

Each rank opens its part of a model, or all of it if it fits, and computes some of the batches.
All ranks have all results in the end; rank 0 writes them. See processes/world.py.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparselong.config import Config, load
from sparselong.evaluate import perplexity
from sparselong.evaluate.opened import measure_opened
from sparselong.evaluate.spread import Spread
from sparselong.evaluate.work import MEMORY_FIX, Mark, Work, scores_path
from sparselong.files import write_atomically
from sparselong.model import describe_placement, implementation, load_model, load_tokenizer
from sparselong.parallel import Mesh, shard_model
from sparselong.processes import (
    decide_evaluation_sharing,
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
from sparselong.runtime import using


def main(path: Path) -> None:
    """Measure the models of the work at `path`, as the rank given by the environment variables."""
    set_environment()
    rank, folder = int(os.environ["RANK"]), path.parent
    tell_failures(folder, rank)
    end_at_once()
    work = Work.read(path)
    config = load(Path(work.run_dir) / "config.yaml")
    ranks.connect()
    held = decide_evaluation_sharing(config)
    mesh = ranks.join(1, held.expert_parallel)
    if ranks.is_first():
        shared = mesh.expert_size > 1
        how = f"{mesh.expert_size} share experts and vocabulary" * shared or "each holds all"
        how += ", experts in host memory" * (held.placement == "host")
        tell(f"{mesh.data_size} processes: {how}")
    for mark in work.models:
        with using(expert_placement=held.placement):
            result = _measure(mark, work, config, mesh, folder)
        if ranks.is_first() and result is not None:
            document = {"digest": work.digest(mark.name), **result}
            write_atomically(scores_path(folder, mark.name), json.dumps(document) + "\n")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    ranks.leave()


def _measure(
    mark: Mark, work: Work, config: Config, mesh: Mesh, folder: Path
) -> dict[str, Any] | None:
    """Return a model's part of the result, the same on every rank but for its speed.

    None if only the base's hidden states are needed.
    """
    start = time.monotonic()
    telling = partial(telling_memory, f"while {mark.name} was measured", MEMORY_FIX)
    reset_peaks()
    passes = {"attention_backend": config.attention_backend, "deterministic": config.deterministic}
    with using(**passes, **shard_model(mesh)):
        with telling():
            model = load_model(Path(mark.directory), attn_implementation=implementation(config))
        loaded = time.monotonic() - start
        if ranks.is_first():
            tell(f"{mark.name}: loaded from {mark.directory} in {loaded:.1f} s")
        tokenizer = load_tokenizer(Path(work.tokenizer)) if any(work.questions[1:]) else None
        spread = Spread(mesh, lambda what, *count: report_progress(f"{mark.name}: {what}", *count))
        samples = [perplexity.Sample(*sample) for sample in work.samples]
        told = work.questions, samples, tokenizer, config
        # Watched one model at a time: ranks may take longer to load than an exchange may.
        with ranks.watched(partial(write_failure, folder, mesh.data_rank)), telling():
            found = measure_opened(mark, model, *told, spread, folder)
            peak_bytes = ranks.merge_peaks(read_peaks())
            placed = describe_placement(model, ranks.collect)
    return found and {
        "perplexity": found.perplexity,
        "divergence": found.divergence,
        "health": found.health,
        **found.answers._asdict(),
        "speed": {"load_seconds": round(loaded, 3), "prompts": found.prompts},
        "seconds": round(time.monotonic() - start, 1),
        "peak_bytes": peak_bytes,
        "experts": placed,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
