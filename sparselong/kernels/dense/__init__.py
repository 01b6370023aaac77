"""Dense layers: masked and rounded weights, their factors' gradients, and unpacking."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.kernels.dense.masked_weight import TILE_ROWS, MaskedWeight
    from sparselong.kernels.dense.masked_weight_torch import sum_weight
    from sparselong.kernels.dense.unpack import unpack_weight

__getattr__ = expose(__name__)
