"""Stage 04: accuracy and perplexity of the compressed and fine-tuned models against the base."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.evaluate.compared import find_compared
    from sparselong.evaluate.inputs import check_models
    from sparselong.evaluate.stage import evaluate
    from sparselong.evaluate.work import rank_arguments

__getattr__ = expose(__name__)
