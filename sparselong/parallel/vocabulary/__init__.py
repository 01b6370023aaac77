"""Embedding, lm_head and loss with the vocabulary sharded over the ranks of an expert group."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.parallel.vocabulary.divergence import (
        COMPARED_ROWS,
        Divergence,
        combine_divergence,
        shard_divergence,
    )
    from sparselong.parallel.vocabulary.replicated import ReplicatedVocabulary
    from sparselong.parallel.vocabulary.sharded import ShardedVocabulary

__getattr__ = expose(__name__)
