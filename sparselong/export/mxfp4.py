"""`mxfp4`: the published form, which whatever opens openai/gpt-oss opens.

Experts' bytes are as they are stored, attention is decoded to the bf16 values that the model
computes with, and config.json has the published `quantization_config`. Tensors that neither
compression nor fine-tuning may have touched must have the base's bytes, if the base is on this
machine; the manifest names those that differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparselong.export.base import compare_with_base
from sparselong.export.form import Work
from sparselong.export.inputs import model_directory
from sparselong.memory import base_groups, compressed_groups, compressed_shape
from sparselong.run import Stage

if TYPE_CHECKING:
    from sparselong.export.source import Source


class Mxfp4Format:
    """The published form."""

    name = "mxfp4"
    summary = "the published form: experts in MXFP4, everything else in bf16"

    def check(self, stage: Stage) -> None:
        """Return at once: every run can give this form."""

    def plan(self, stage: Stage) -> Work:
        """Return the bytes of the published form."""
        shape = compressed_shape(stage.config)
        source = sum(compressed_groups(shape, stage.config).values())
        written = sum(base_groups(shape).values())
        return Work(written, 2 * source + written)  # to write, to compare, and the base

    def write(self, stage: Stage) -> None:
        """Write the shards, the side files and config.json."""
        from sparselong.checkpoint import PUBLISHED_QUANTIZATION
        from sparselong.export.shards import plan_shards, write_shards, write_side_files

        source = _open(stage)
        shards = plan_shards(source.shapes)
        write_shards(stage, shards, source.parts)
        config = {**source.checkpoint.config, "quantization_config": PUBLISHED_QUANTIZATION}
        write_side_files(stage, source.checkpoint, shards, config)

    def verify(self, stage: Stage) -> dict[str, Any]:
        """Open the directory as stage 02 opens a base, and compare it with the base."""
        from sparselong.checkpoint import Checkpoint, open_upstream

        written = Checkpoint(stage.dir)
        open_upstream(written)
        return compare_with_base(stage, written)


def _open(stage: Stage) -> Source:
    from sparselong.export.source import Source
    from sparselong.runtime import default_device

    return Source(model_directory(stage), default_device())
