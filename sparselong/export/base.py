"""Which tensors of an export are the base's, byte for byte, and which are not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparselong.errors import StageError
from sparselong.export.inputs import FINETUNE, find_base, origin_of
from sparselong.run import Stage

if TYPE_CHECKING:
    from sparselong.checkpoint import Checkpoint


def compare_with_base(stage: Stage, written: Checkpoint) -> dict[str, Any]:
    """Return metrics: counts of the tensors and names of those that differ from the base's.

    Tensors under names that the base has not, such as decoded experts, are left out. If experts
    were dropped, those that are kept are compared, and their rows of the router. Without the base,
    `identical_to_base` and `differing_from_base` are None.

    Args:
        stage: the part.
        written: the export.

    Raises:
        StageError: a tensor differs that neither compression nor fine-tuning may have touched.
    """
    from sparselong.checkpoint import Checkpoint, same_base_bytes

    metrics: dict[str, Any] = {"tensors": len(written.tensors)}
    folder = find_base(stage)
    if folder is None:
        stage.log(f"the base {stage.config.model.base} is not here: not compared with it")
        return {**metrics, "identical_to_base": None, "differing_from_base": None}
    base = Checkpoint(folder)
    shared = [name for name in written.tensors if name in base.tensors]
    differing = sorted(name for name in shared if not same_base_bytes(written, base, name))
    changed = [name for name in differing if not _may_differ(stage, name)]
    if changed:
        raise StageError(
            f"{len(changed)} tensors differ from the base's that no stage should have changed",
            f"the bytes of {folder}",
            f"other bytes in {', '.join(changed[:4])}",
            f"redo the stages from {origin_of(stage)} on: python {origin_of(stage)}.py --force",
        )
    return {
        **metrics,
        "untouched_tensors": sum(not _may_differ(stage, name) for name in shared),
        "identical_to_base": len(shared) - len(differing),
        "differing_from_base": differing,
    }


def _may_differ(stage: Stage, name: str) -> bool:
    """Return whether a published tensor's values may differ from the base's, by the config."""
    from sparselong.checkpoint import PROJECTIONS

    config, module, last = stage.config, *name.split(".")[-2:]
    dense = config.shared_dense
    packed = dense.sparsity != "none" or dense.weight_bits < 16
    if module in PROJECTIONS and last == "weight" and packed:
        return True
    if last.endswith("_blocks") and config.experts.sparsity != "none":
        return True
    if origin_of(stage) != FINETUNE:
        return False
    lora, stem = config.lora, last.rpartition("_")[0]
    if last.endswith(("_blocks", "_scales")):
        return stem in lora.expert_targets
    tuned = {*lora.target_modules, *(["router"] if lora.router else [])}
    return last == "weight" and module in tuned
