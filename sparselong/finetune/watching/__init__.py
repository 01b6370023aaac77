"""What is recorded while a model trains, and what ends training early.

metrics.py writes a row for each logged step and evaluation to metrics.jsonl and to the trackers
(trackers.py), and shows progress. stopping.py ends training at a loss or without improvement.
predictions.py gives each evaluation's most likely tokens to a function of the user's
(functions.py).
"""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.finetune.watching.functions import MetricFunction
    from sparselong.finetune.watching.metrics import Metrics
    from sparselong.finetune.watching.predictions import Predictions
    from sparselong.finetune.watching.stopping import Stopping
    from sparselong.finetune.watching.trackers import check_trackers, open_trackers

__getattr__ = expose(__name__)
