"""The planner: config → bytes per GPU, bytes on disk, seconds. Pure arithmetic, no torch.

shape.py holds the model's sizes, storage.py what the weights take (exact), training.py what
fine-tuning keeps in memory (weights exact, activations estimated), timing.py a roofline, plan.py
puts them together, table.py prints them.
"""

from sparselong.memory.plan import Plan, configured_device, plan, plan_stage
from sparselong.memory.shape import PUBLISHED, ModelShape, find_shape, read_shape, tiny_shape
from sparselong.memory.table import format_bytes, format_seconds, show_plan
from sparselong.memory.training import GIB, Memory, finetune_memory, largest_sequence_len

__all__ = [
    "GIB",
    "Memory",
    "ModelShape",
    "PUBLISHED",
    "Plan",
    "configured_device",
    "find_shape",
    "finetune_memory",
    "format_bytes",
    "format_seconds",
    "largest_sequence_len",
    "plan",
    "plan_stage",
    "read_shape",
    "show_plan",
    "tiny_shape",
]
