"""One format of stage 05: written, reopened, compared, and recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparselong.export.formats import find_format
from sparselong.export.hub import HUB
from sparselong.export.inputs import FINETUNE, check_model_files, model_directory, origin_of
from sparselong.export.outputs import list_outputs
from sparselong.provenance import read_peaks, reset_peaks
from sparselong.run import Stage


def export(stage: Stage) -> None:
    """Write one format to its directory, and fill its manifest.

    Raises:
        StageError: the model is not what its stage recorded, the disk is full, or what was written
            reads differently.
    """
    made = find_format(stage.part)
    check_model_files(stage)
    stage.log(f"{made.name}: {made.summary}, from {model_directory(stage)}")
    reset_peaks()
    made.write(stage)
    metrics = made.verify(stage)
    stage.outputs = list_outputs(stage)
    stage.peak_bytes = read_peaks()
    stage.metrics |= {
        **_describe_check(stage, metrics),
        **metrics,
        "peak_host_bytes": stage.peak_bytes["host"],
    }
    trained = stage.manifests.get(FINETUNE, {}).get("metrics", {})
    if "expert_rounding" in trained:
        stage.metrics["expert_merge_error"] = trained["expert_rounding"]
    stage.inputs = stage.inputs or [stage.run_dir / origin_of(stage) / "model"]


def _describe_check(stage: Stage, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bytes of what a part made, and what `verify` has shown of it.

    An upload opens no tensors: its files were when they were exported, and it compares hashes.
    """
    if stage.part == HUB:
        return {"bytes": metrics["uploaded_bytes"]}
    size = sum(path.stat().st_size for path in stage.outputs)
    # Tensors are identical to their sources; anything else was raised.
    return {"bytes": size, "reloaded": True, "tensors_identical": True}
