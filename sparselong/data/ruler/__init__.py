"""RULER's synthetic long-context tasks, of a given length in tokens. Imports no torch."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.data.ruler.items import (
        LEFT_OUT,
        answer_tokens,
        check_ruler,
        make_items,
        score_answer,
    )
    from sparselong.data.ruler.words import load_words

__getattr__ = expose(__name__)
