"""Experts shared by several processes: each holds some, and all exchange rows."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.parallel.experts.exchange import ShardedExperts
    from sparselong.parallel.experts.pipeline import FAR_ROWS, NEAR_ROWS

__getattr__ = expose(__name__)
