"""RMSNorm, rotary embedding, router and cross-entropy."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.kernels.layer.cross_entropy import (
        CHUNK_ROWS,
        IGNORED,
        check_loss_arguments,
        linear_cross_entropy,
        token_losses,
    )
    from sparselong.kernels.layer.cross_entropy_shard import (
        combine_statistics,
        shard_statistics,
        turn_into_shard_gradients,
    )
    from sparselong.kernels.layer.norm import add_rms_norm, rms_norm, rms_norm_and_input
    from sparselong.kernels.layer.rotary import rotate, rotate_back, rotate_projections
    from sparselong.kernels.layer.router import Router, route

__getattr__ = expose(__name__)
