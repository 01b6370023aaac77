"""The small gpt-oss, built locally, and the directory of a config's base checkpoint."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.tiny.base import resolve_base

__getattr__ = expose(__name__)
