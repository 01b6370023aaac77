"""Bit-exact packing and unpacking of every stored weight format, in plain torch."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.packing import dense, integer, mxfp4, two_four
    from sparselong.packing.dense import DenseFormat
    from sparselong.packing.integer import code_range
    from sparselong.packing.two_four import GROUP

__getattr__ = expose(__name__)
