"""One sweep over a weight's columns that prunes to 2:4 and rounds, and passes the errors on."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.kernels.sweep.op import Swept, sweep_columns

__getattr__ = expose(__name__)
