"""Comparison of the models: results.json, report.md, evaluation.png, the manifest's metrics."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.evaluate.report.page import render
    from sparselong.evaluate.report.plot import draw
    from sparselong.evaluate.report.results import build_results, list_metrics, summarize

__getattr__ = expose(__name__)
