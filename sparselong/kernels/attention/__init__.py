"""Attention with sinks, sliding windows and packed documents."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.kernels.attention.choice import describe_choice
    from sparselong.kernels.attention.installed import FLASH_ATTN_4, refuse_flash_attn_4
    from sparselong.kernels.attention.key_gradients import RunGradients, sort_gradients
    from sparselong.kernels.attention.mask import (
        AttentionCall,
        Documents,
        Mask,
        SavedForward,
        find_documents,
        mark_starts,
        refuse_gaps,
    )
    from sparselong.kernels.attention.op import attention, load_backend, pick_backend, plan_pays
    from sparselong.kernels.attention.passes import Choice, run_backward, run_forward
    from sparselong.kernels.attention.triton_forward import LOG2E

__getattr__ = expose(__name__)
