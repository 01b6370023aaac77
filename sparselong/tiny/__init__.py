"""The small gpt-oss, built locally, and the opened and checked inputs of a config."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.tiny.base import early_tokenizer, find_tiny, resolve_base
    from sparselong.tiny.inputs import (
        Inputs,
        check_early,
        check_rows,
        encode_rows,
        open_base,
        open_inputs,
        open_tokenizer,
    )

__getattr__ = expose(__name__)
