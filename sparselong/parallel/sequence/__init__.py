"""A sequence sharded over several ranks: shards, exchange plan and attention."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.parallel.sequence.context import Context, take_layout
    from sparselong.parallel.sequence.shard import shard_batch

__getattr__ = expose(__name__)
