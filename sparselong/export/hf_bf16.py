"""`hf-bf16`: all weights decoded to bf16, for tools that know no MXFP4.

Names and shapes are those under which transformers holds gpt-oss: experts are [experts, in, out].
config.json has no `quantization_config`. Every MXFP4 value is exact in bf16; the export stops if
one is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sparselong.errors import StageError
from sparselong.export.base import compare_with_base
from sparselong.export.form import Work
from sparselong.export.inputs import model_directory
from sparselong.memory import compressed_groups, compressed_shape
from sparselong.run import Stage

if TYPE_CHECKING:
    import torch

    from sparselong.checkpoint import Shapes
    from sparselong.export.source import Source


class Bf16Format:
    """Everything in bf16."""

    name = "hf-bf16"
    summary = "everything decoded to bf16, for transformers without any quantization"

    def check(self, stage: Stage) -> None:
        """Return at once: every run can give this form."""

    def plan(self, stage: Stage) -> Work:
        """Return two bytes a parameter; experts are decoded to write and again to compare."""
        shape = compressed_shape(stage.config)
        source = sum(compressed_groups(shape, stage.config).values())
        return Work(2 * shape.total, 2 * source, 2 * shape.expert_weights)

    def write(self, stage: Stage) -> None:
        """Write the shards, the side files and config.json."""
        from sparselong.export.shards import plan_shards, write_shards, write_side_files
        from sparselong.export.source import EXPERTS, Source
        from sparselong.runtime import default_device

        source = Source(model_directory(stage), default_device())

        def parts(name: str) -> Iterator[torch.Tensor]:
            is_stack = name.endswith(EXPERTS)
            return source.decoded_experts(name) if is_stack else source.parts(name)

        shards = plan_shards(_decoded_shapes(source))
        write_shards(stage, shards, parts)
        config = {**source.checkpoint.config, "dtype": "bfloat16"}
        del config["quantization_config"]
        config.pop("torch_dtype", None)  # the older name of dtype
        write_side_files(stage, source.checkpoint, shards, config)

    def verify(self, stage: Stage) -> dict[str, Any]:
        """Compare names and shapes with transformers' own model, and bytes with the base."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from sparselong.checkpoint import Checkpoint

        config = AutoConfig.from_pretrained(stage.dir)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        written = Checkpoint(stage.dir)
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {name: record.shape for name, record in written.tensors.items()}
        if wanted != found:
            differing = sorted(set(wanted.items()) ^ set(found.items()))
            raise StageError(
                f"{stage.dir} does not hold the tensors of transformers' model",
                f"{len(wanted)} tensors of {type(model).__name__}",
                f"differences in {', '.join(name for name, _ in differing[:4])}",
                "install the transformers of requirements/requirements.lock",
            )
        return compare_with_base(stage, written)


def _decoded_shapes(source: Source) -> Shapes:
    """Return dtype and shape of each tensor with the experts' blocks and scales decoded."""
    shapes: Shapes = {}
    for name, (dtype, shape) in source.shapes.items():
        if name.endswith("_blocks"):
            experts, rows, groups, _ = shape
            shapes[name.removesuffix("_blocks")] = "BF16", (experts, 32 * groups, rows)
        elif not name.endswith("_scales"):
            shapes[name] = dtype, shape
    return shapes
