"""One run directory, one command line, one manifest per stage. No torch.

stages.py is the table of stages: what each reads and which config keys decide its result.
directory.py keeps the promises of the run directory, command.py is the program that every numbered
script is: read the config, lock the run directory, see whether the stage is done already and what
it reads is there, do it, and write `manifest.json` last.
"""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.run.command import parse_arguments, run_stage
    from sparselong.run.directory import Stage, read_manifest

__getattr__ = expose(__name__)
