"""LoRA trained through mask and rounding, LoRA on experts and router, merging and baking."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.adapters.attach import (
        ExtraAdapters,
        Masters,
        add_masked_lora,
        count_trainable,
        parameter_table,
        tuned_layers,
    )
    from sparselong.adapters.bake import bake_checkpoint, name_adapter, put_baked_experts
    from sparselong.adapters.expert_factors import (
        keep_dtypes,
        sharded_parameters,
        whole_state_dict,
    )
    from sparselong.adapters.lora import MaskedLoraLinear, masked_layers
    from sparselong.adapters.masks import Criterion, update_steps
    from sparselong.adapters.merge import Rounding

__getattr__ = expose(__name__)
