"""Stage 02: compress the base checkpoint layer by layer into the packed one."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.compress.stream import compress
    from sparselong.compress.work import rank_arguments

__getattr__ = expose(__name__)
