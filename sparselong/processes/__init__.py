"""The ranks of a stage as processes: started, watched, stopped and explained."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.processes import world
    from sparselong.processes.failure import tell_failures, write_failure
    from sparselong.processes.follow import follow_or_lead, train_together
    from sparselong.processes.launch import find_world, joined_rank
    from sparselong.processes.process import MARK
    from sparselong.processes.world import check_replicas

__getattr__ = expose(__name__)
