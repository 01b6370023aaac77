"""Texts that occur twice: in two conversations, or in one and in an item of an evaluation task."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.data.overlap.contamination import warn_of_items
    from sparselong.data.overlap.items import describe_item
    from sparselong.data.overlap.repeated import REPEATED, find_repeated
    from sparselong.data.overlap.training import warn_before_training

__getattr__ = expose(__name__)
