"""Run directories, manifests and the command line of the stages. No torch.

stages.py is the table of stages: what each reads and which config keys affect its result.
directory.py maintains the run directory. command.py is the program behind every numbered script: it
reads the config, locks the run directory, checks whether the stage is up to date and its inputs
exist, executes the stage, and writes `manifest.json` last. parts.py does so for a stage with
several results, session.py for a script that makes none. manifests.py reads what finished stages
recorded, finished.py that of a whole run, and changes.py compares the inputs with it. publishing.py
has the page about the run written. interruption.py makes signals end a block as interruptions.
progress.py shows how far a stage is, log.py writes log.txt, and latest.py names finished models.
"""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.run.command import Others, parse_arguments, run_stage
    from sparselong.run.directory import Stage, check_begun
    from sparselong.run.finished import config_of, find_outdated, read_finished
    from sparselong.run.interruption import interruptible
    from sparselong.run.lock import locked, writing
    from sparselong.run.log import remove_control
    from sparselong.run.manifests import read_manifest
    from sparselong.run.parts import Choice, Part, run_parts
    from sparselong.run.place import MANIFEST, check_run_dir
    from sparselong.run.session import run_session
    from sparselong.run.stages import complete_commands, redo_command, stage_hash

__getattr__ = expose(__name__)
