"""Several processes: mesh, sequence and vocabulary shards, collectives, gradients, loss."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.parallel.apply import replicate_rows, shard_model, share_batch
    from sparselong.parallel.collectives import (
        ExchangeError,
        all_gather,
        explain_exchange,
        progress,
    )
    from sparselong.parallel.gradients import gradient_norm, reduce_gradients
    from sparselong.parallel.loss import (
        add_losses,
        count_step,
        count_supervised,
        mean_loss,
        shift_labels,
        supervised_labels,
    )
    from sparselong.parallel.mesh import Mesh, build_mesh
    from sparselong.parallel.sequence.shard import place_tokens

__getattr__ = expose(__name__)
