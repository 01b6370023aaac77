"""Decoding at batch 1 over a cache of fixed size, captured in a CUDA graph."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.generation.decoder import Decoder, generate
    from sparselong.generation.shared import SharedModel, share_model

__getattr__ = expose(__name__)
