"""What compression and fine-tuning did to the model: accuracy and perplexity against the base."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.evaluate.stage import evaluate

__getattr__ = expose(__name__)
