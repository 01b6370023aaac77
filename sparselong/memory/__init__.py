"""The planner: config → bytes per GPU, bytes on disk, seconds. Pure arithmetic, no torch.

base_config.py reads a base's config.json, shape.py holds the model's sizes, storage.py the size of
the weights (exact), training.py the peak memory of fine-tuning by component, exchange.py what
sharing experts and vocabulary adds to it, slicing.py what layers in slices of rows take instead,
stages.py the memory of the other stages, placing.py what is kept, shared, in slices and in host
memory, ways.py compares these ways for stage 03 and evaluated.py for
stage 04, fit.py says what fits and what to change, timing.py is a roofline model. plan.py combines
them and table.py prints them.
"""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.memory.base_config import (
        DROPPED_EXPERTS,
        check_token_ids,
        read_base_config,
    )
    from sparselong.memory.fit import (
        check_fit,
        check_host,
        describe_held,
        least_peak_bytes,
        suggest_changes,
    )
    from sparselong.memory.limits import check_layers, check_model
    from sparselong.memory.placing import (
        MARGIN,
        decide_evaluation_held,
        decide_held,
        decide_kept,
        decided_memory,
        host_bytes,
        settle,
    )
    from sparselong.memory.plan import Plan, make_plan, plan_stage
    from sparselong.memory.shape import (
        PUBLISHED,
        ModelShape,
        check_heads,
        compressed_shape,
        drop_experts,
        find_config,
        find_shape,
    )
    from sparselong.memory.slicing import rows_at_once
    from sparselong.memory.stages import compress_batch_tokens, evaluation_memory
    from sparselong.memory.storage import Held, adapter_bytes, base_groups, compressed_groups
    from sparselong.memory.table import WIDTH, cost_lines, format_table, memory_lines, show_plan
    from sparselong.memory.timing import find_rate
    from sparselong.memory.training import (
        CONTEXT_BYTES,
        SLICE_TOKENS,
        Kept,
        Memory,
        finetune_memory,
        process_tokens,
    )
    from sparselong.memory.ways import count_layers, describe_layers

__getattr__ = expose(__name__)
