"""The gpt-oss model over packed weights, in transformers."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.model.attention import NAME, implementation
    from sparselong.model.description import describe_weights
    from sparselong.model.documents import document_masks
    from sparselong.model.fused import (
        FusedAttention,
        FusedDecoderLayer,
        chunk_loss,
        fuse,
        watch_routers,
    )
    from sparselong.model.host_experts import (
        check_unchanged,
        describe_placement,
        find_host_experts,
    )
    from sparselong.model.loading import load_model
    from sparselong.model.packed_experts import PackedExperts
    from sparselong.model.packed_linear import PackedLinear, StoredBuffers
    from sparselong.model.part import Part
    from sparselong.model.projections import stored_projections, two_four_conforming
    from sparselong.model.quantizer import SparseLongConfig
    from sparselong.model.row_slices import slice_rows
    from sparselong.model.tokenizer import (
        check_rows_kept,
        check_tokenizer_files,
        load_tokenizer,
        settle_template,
    )
    from sparselong.model.vocabulary import PartialHead, score_tokens

__getattr__ = expose(__name__)
