"""Kernels, a folder an operation; tests/references/ holds an independent definition of each."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.kernels.expert_stack import (
        ExpertStack,
        Gate,
        HostStack,
        PackedWeight,
        Passing,
    )
    from sparselong.kernels.opaque import leave_graph, make_opaque

__getattr__ = expose(__name__)
