"""Sweeps: stage 03 for each combination of some keys' values, one run directory each.

    python 03_finetune.py --sweep training.learning_rate=1e-5,5e-5,2e-4 lora.r=8,16

    runs/NAME-sweep/learning_rate=1e-05,r=8/     a run like any other; and so on
    runs/NAME-sweep/sweep.md  sweep.json         the runs side by side, from their own manifests
    runs/NAME-sweep/sweep.png                    their validation curves

runs.py makes the runs of the command line and plans them. command.py executes one after another,
each by the same scripts that a person would start, so that a run of a sweep is a run: it is
resumed, redone, evaluated and exported like one. sharing.py gives a run the model that stage 02 has
made for the same keys elsewhere. comparison.py makes the table and curves.py the plot.
"""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.sweep.command import run_sweep

__getattr__ = expose(__name__)
