"""Start, watch and stop a stage's ranks, each in its own process, and explain their failures."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.processes import world
    from sparselong.processes.beside import working_beside
    from sparselong.processes.failure import (
        OutOfMemory,
        TrainerEnded,
        end_at_once,
        tell_failures,
        telling_memory,
        write_failure,
    )
    from sparselong.processes.follow import follow_or_lead, train_together
    from sparselong.processes.launch import (
        World,
        check_alone,
        check_cores,
        check_launcher,
        evaluation_world,
        find_world,
        hide_launcher,
        is_joined,
        is_one_machine,
        joined_rank,
        joined_world,
        local_rank,
        usable_cores,
    )
    from sparselong.processes.marks import report_progress, tell
    from sparselong.processes.scripts import Ended, run_script
    from sparselong.processes.sharing import (
        Sharing,
        available_bytes,
        decide_evaluation_sharing,
        decide_sharing,
        decided_sharing,
    )
    from sparselong.processes.watch import end_other_ranks
    from sparselong.processes.world import check_replicas

__getattr__ = expose(__name__)
