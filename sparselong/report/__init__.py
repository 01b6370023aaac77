"""`runs/NAME/report.html`: one page about every finished stage of a run. Needs no torch.

source.py reads the run's directory, and nothing else is read. Each part of the page is a module
that returns HTML: overview, asked, machine, compression, training, evaluation, samples, exported,
environment. page.py puts them together. They are made of `elements/`, in which text is escaped
whenever it becomes part of an element: a model's samples cannot become markup. What stage 04 wrote
and no module knows is shown as it is (elements/anything.py).

    python -m sparselong.report runs/NAME        write the page again
"""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.report.page import write_page

__getattr__ = expose(__name__)
