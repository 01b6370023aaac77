"""lm-eval's tasks, this project's among them: what they ask, and how answers are graded."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.evaluate.tasks.asking import grade, list_questions
    from sparselong.evaluate.tasks.suite import Suite, list_items, load_suite

__getattr__ = expose(__name__)
