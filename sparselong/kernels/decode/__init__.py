"""Kernels of a decoding step at batch 1, captured in a CUDA graph."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.kernels.decode.attention import (
        FULL_PARTS,
        QUERIES,
        LayerAttention,
        launch_attend,
    )
    from sparselong.kernels.decode.experts import launch_experts, run_generation
    from sparselong.kernels.decode.gemv import Matrix, as_matrix, launch_gemv, packed_gemv
    from sparselong.kernels.decode.glue import (
        RouteBuffers,
        launch_embed,
        launch_head,
        launch_pack,
        launch_route,
    )
    from sparselong.kernels.decode.token_word import (
        decode_token,
        encode_token,
        holds_finite,
        replace_token,
    )

__getattr__ = expose(__name__)
