"""Benchmarks, one script a subject, in the environment in which the pipeline runs.

Figures of memory depend on expandable segments, and times on a CPU on how threads wait.
"""

from sparselong import set_environment

set_environment()
