"""Opening the model: whole in this process, or a part of it in each of several.

Several processes share experts and vocabulary, and all of them compute each token
(`generation/shared.py`). This one is rank 0: it has the terminal, the question or the endpoint, and
samples with the random numbers that the others get from it. They are started here (rank.py) if the
model does not fit on one GPU and fits on those that stage 04 would use, or if the config sets
`expert_parallel_degree`; torchrun's processes are used in any case.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GptOssForCausalLM

from sparselong.chat.command import check_processes, rank_arguments
from sparselong.chat.engine import Engine, open_model
from sparselong.chat.sources import (
    READS,
    Source,
    check_room,
    find_model,
    name_of,
    reads_of,
    room_of,
)
from sparselong.config import Config
from sparselong.errors import StageError
from sparselong.generation import SharedModel, share_model
from sparselong.model import implementation
from sparselong.processes import (
    decide_evaluation_sharing,
    decided_sharing,
    evaluation_world,
    telling_memory,
    working_beside,
)
from sparselong.processes import world as ranks
from sparselong.run import Stage
from sparselong.runtime import using

MEMORY_FIX = "pass a smaller --context, or experts.placement=host"
Document = dict[str, Any]


class Work(NamedTuple):
    """What rank 0 tells the other ranks.

    Attributes:
        config: the run's config, by whose base and `experts.keep` the model's memory is planned.
        source: the checkpoint.
    """

    config: Config
    source: Source


def use_model(
    stage: Stage, arguments: argparse.Namespace, use: Callable[[Engine], Document]
) -> Document:
    """Open the model that the command line names, and return what `use` gives.

    Raises:
        StageError: the model cannot be opened or does not fit, or another rank failed.
        ConfigError: the config asks for another number of processes than there are.
    """
    check_processes(stage.config)
    source = find_model(stage, arguments.model)
    check_room(source, room_of(stage.config, arguments.context))
    work = Work(_as_base(stage.config, arguments.model, source), source)
    processes, placement = _plan(work.config)
    if processes == 1:
        settled = _settle(work.config, placement)
        with using(**settled), telling_memory(fix=MEMORY_FIX):
            return use(_open_engine(stage, arguments, source, settled))
    stage.log(f"{name_of(stage, arguments.model)}: opened in {processes} processes")
    with working_beside(stage, rank_arguments(stage), processes):
        begun = time.monotonic()

        def lead(shared: SharedModel, settled: Document) -> Document:
            stage.log(f"sharing {decided_sharing()}")
            return use(_open_engine(stage, arguments, source, settled, shared, begun))

        result = take_part(work, lead)
    assert result is not None, "rank 0 leads"
    return result


def take_part(
    work: Work | None,
    lead: Callable[[SharedModel, Document], Document],
    tell: Callable[[StageError], None] = lambda _: None,
) -> Document | None:
    """Open this process's part of the model; call `lead` on rank 0, and follow it on the others.

    Args:
        work: what is opened; only rank 0's counts.
        lead: gets the shared model and the settings of its passes.
        tell: as for `share_model`.

    Returns:
        What `lead` returns; None on the other ranks.
    """
    ranks.connect()
    told: list[Work] = ranks.collect(work)
    config, source = told[0]
    config = config.model_copy(update={"expert_parallel_degree": len(told)})
    # The rank with the least memory decides, now that all are connected.
    held = decide_evaluation_sharing(config, with_base=False)
    settled = _settle(config, held.placement)

    def open_part(_: Path, device: torch.device) -> GptOssForCausalLM:
        return open_model(source, implementation(config), device)

    with using(**settled), telling_memory(fix=MEMORY_FIX):
        return share_model(source.directory, lambda shared: lead(shared, settled), open_part, tell)


def _as_base(config: Config, model: str, source: Source) -> Config:
    """Return the config with a named directory as its base, by whose shape memory is planned.

    A named directory, and the run's base, have all their experts, whatever the config keeps.
    """
    if not reads_of(model) and config.experts.keep is not None:
        whole = config.experts.model_copy(update={"keep": None})
        config = config.model_copy(update={"experts": whole})
    if model in READS:
        return config
    named = config.model.model_copy(update={"base": str(source.directory.resolve())})
    return config.model_copy(update={"model": named})


def _plan(config: Config) -> tuple[int, str]:
    """Return how many processes hold the model, and where its experts are held.

    It is judged as stage 04 does, which passes over as many tokens at once.

    Raises:
        StageError: the model fits in no way.
    """
    base = Path(config.model.base)
    if base.is_dir() and not (base / "config.json").is_file():
        return 1, "gpu"  # opening it tells what is missing
    world = evaluation_world(config, torch.cuda.device_count())
    if world.joined:
        return world.size, "gpu"  # decided when all are connected
    held = decide_evaluation_sharing(config, world.size, with_base=False)
    return held.expert_parallel, held.placement


def _settle(config: Config, placement: str) -> Document:
    """Return the settings of the model's passes."""
    return {
        "attention_backend": config.attention_backend,
        "deterministic": config.deterministic,
        "expert_placement": placement,
    }


def _open_engine(
    stage: Stage,
    arguments: argparse.Namespace,
    source: Source,
    settled: Document,
    shared: SharedModel | None = None,
    begun: float | None = None,
) -> Engine:
    """Return what answers, inside of `using(**settled)`."""
    name = name_of(stage, arguments.model)
    engine = Engine(
        source,
        name,
        room_of(stage.config, arguments.context),
        stage.config.data.date or datetime.date.today(),  # not the day of the training
        implementation(stage.config),
        settled,
        shared,
    )
    if begun is not None:
        engine.load_seconds = time.monotonic() - begun
    print(f"{name}: opened in {engine.load_seconds:.1f} s", file=sys.stderr, flush=True)
    return engine
