"""Settings and state of a pass through the model; no other folder holds such state."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.runtime.device import compute_dtype, default_device
    from sparselong.runtime.host_memory import allocate_locked, seen_from_gpu
    from sparselong.runtime.last_results import call_once
    from sparselong.runtime.layer_inputs import DeviceInputs, HostInputs
    from sparselong.runtime.recompute import (
        attend_once,
        begin_ahead,
        checkpoint_contexts,
        checkpoint_layers,
        compute_once,
        freed_outputs,
        is_checkpointed,
        is_recomputing,
        keeps_experts,
        recomputing,
        unused_output,
    )
    from sparselong.runtime.settings import (
        ExpertExchange,
        Settings,
        current,
        restoring,
        using,
    )

__getattr__ = expose(__name__)
