"""The planner: config → bytes per GPU, bytes on disk, seconds. Pure arithmetic, no torch.

shape.py holds the model's sizes, storage.py what the weights take (exact), training.py the peak of
fine-tuning by component, stages.py that of the other stages, fit.py what fits a card and what to
change, timing.py a roofline; plan.py puts them together, table.py prints them.
"""

from sparselong.memory.fit import (
    CARD_BYTES,
    MARGIN,
    decide_kept,
    is_kept,
    kept_peaks,
    largest_sequence_len,
    suggest_changes,
)
from sparselong.memory.plan import Plan, configured_device, plan, plan_stage
from sparselong.memory.shape import PUBLISHED, ModelShape, find_shape, read_shape, tiny_shape
from sparselong.memory.table import format_bytes, format_seconds, show_plan
from sparselong.memory.training import ALLOCATOR, CONTEXT_BYTES, GIB, Kept, Memory, finetune_memory

__all__ = [
    "ALLOCATOR",
    "CARD_BYTES",
    "CONTEXT_BYTES",
    "GIB",
    "Kept",
    "MARGIN",
    "Memory",
    "ModelShape",
    "PUBLISHED",
    "Plan",
    "configured_device",
    "decide_kept",
    "find_shape",
    "finetune_memory",
    "format_bytes",
    "format_seconds",
    "is_kept",
    "kept_peaks",
    "largest_sequence_len",
    "plan",
    "plan_stage",
    "read_shape",
    "show_plan",
    "suggest_changes",
    "tiny_shape",
]
