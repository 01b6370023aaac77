"""The small gpt-oss made on the spot, and the directory of the base that a config names."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.tiny.base import resolve_base

__getattr__ = expose(__name__)
