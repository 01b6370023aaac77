"""What the page is made of: escaped HTML, tables, charts, figures for people. Knows no stage."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.report.elements.anything import show_anything
    from sparselong.report.elements.axes import linear_axis, log2_axis, step_axis
    from sparselong.report.elements.charts import Interval, Series, chart, intervals, stacked_bars
    from sparselong.report.elements.figures import (
        MISSING,
        is_number,
        show,
        show_bytes,
        show_change,
        show_number,
        show_percent,
        show_seconds,
    )
    from sparselong.report.elements.markup import Child, Markup, element, join, stylesheet
    from sparselong.report.elements.tables import beside, folded, note, pairs, table

__getattr__ = expose(__name__)
