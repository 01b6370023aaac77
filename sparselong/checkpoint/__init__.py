"""Reading, writing and describing safetensors checkpoints in upstream's format and in ours."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.checkpoint.architecture import (
        Shapes,
        layer_tensors,
        model_tensors,
        open_upstream,
    )
    from sparselong.checkpoint.checkpoint import Checkpoint, same_bytes, write_tensors
    from sparselong.checkpoint.derivation import derive
    from sparselong.checkpoint.format import (
        PROJECTIONS,
        PUBLISHED_QUANTIZATION,
        expert_shapes,
        pack_two_four_experts,
        unpack_two_four_experts,
    )
    from sparselong.checkpoint.header import read_header
    from sparselong.checkpoint.inventory import (
        CONFIG,
        DOWNLOADED,
        INDEX,
        METHOD,
        TOKENIZER,
        Inventory,
        check_recorded,
        missing_files,
        take_inventory,
    )
    from sparselong.checkpoint.kept_experts import (
        describe_kept,
        has_expert_rows,
        same_base_bytes,
        show_ranges,
    )
    from sparselong.checkpoint.layout import (
        KEPT_BYTES,
        PATTERN_BYTES,
        count_bytes,
        master_tensors,
        stored_tensors,
    )
    from sparselong.checkpoint.slices import Entry, begin_file, make_header, write_rows

__getattr__ = expose(__name__)
