"""The config schema: keys, defaults, checks, profiles and generated documentation. No torch."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.config import schema
    from sparselong.config.cost import GpuType, find_type
    from sparselong.config.data import TrainOn
    from sparselong.config.evaluation import RULER_TASKS
    from sparselong.config.grid import read_grid
    from sparselong.config.keys import leaves, pick_sections
    from sparselong.config.overrides import refuse_repeated, split_overrides
    from sparselong.config.profiles import PROFILES, describe_profile
    from sparselong.config.schema import (
        CalibrationSection,
        Config,
        ModelSection,
        Solver,
        dump,
        hash_sections,
        is_resolved,
        load,
    )
    from sparselong.config.texts import UTF8_FIX, check_place
    from sparselong.config.training import TrainingSection

__getattr__ = expose(__name__)
