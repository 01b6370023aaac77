"""Stage 01: check whether this machine can run a config."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.health.stage import examine

__getattr__ = expose(__name__)
