"""One weight: the moments of its inputs, and the solvers that prune and round it for them."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.compress.weights.factor import make_up
    from sparselong.compress.weights.hessian import Drift, Hessian
    from sparselong.compress.weights.solver import Compressed, compress_weight, empty

__getattr__ = expose(__name__)
