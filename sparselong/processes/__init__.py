"""Start, watch and stop a stage's ranks, each in its own process, and explain their failures."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.processes import world
    from sparselong.processes.failure import (
        TrainerEnded,
        tell_failures,
        telling_memory,
        write_failure,
    )
    from sparselong.processes.follow import follow_or_lead, train_together
    from sparselong.processes.launch import (
        check_alone,
        check_cores,
        find_world,
        hide_launcher,
        is_joined,
        joined_rank,
        usable_cores,
    )
    from sparselong.processes.process import MARK
    from sparselong.processes.sharing import (
        Sharing,
        available_bytes,
        decide_sharing,
        decided_sharing,
    )
    from sparselong.processes.world import check_replicas

__getattr__ = expose(__name__)
