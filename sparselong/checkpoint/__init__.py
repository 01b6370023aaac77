"""Reading, writing and describing safetensors checkpoints in upstream's format and in ours."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.checkpoint.architecture import layer_tensors, open_upstream
    from sparselong.checkpoint.checkpoint import Checkpoint, derive, same_bytes, write_tensors
    from sparselong.checkpoint.format import (
        METHOD,
        PROJECTIONS,
        expert_shapes,
        pack_two_four_experts,
        unpack_two_four_experts,
    )

__getattr__ = expose(__name__)
