"""The config's section `evaluation`: see schema.py."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sparselong.config.keys import Incidental, Section
from sparselong.config.texts import Place, Text
from sparselong.config.values import Count, Length, Positive

RULER_TASKS = (
    *("ruler_vt", "ruler_fwe", "ruler_cwe"),
    *("niah_single_1", "niah_multikey_2", "niah_multikey_3"),
)
"""RULER's tasks that need no network, by lm-eval's names."""


class RulerSection(Section):
    """Sizes of RULER's long-context tasks."""

    lengths: Annotated[tuple[Length, ...], Field(min_length=1)] = (4096, 8192, 16384, 32768)
    """Contexts that items fill: prompt and answer, in tokens of the base's tokenizer. Each is a
    task of its own, such as `ruler_vt_4096`."""
    items: Length = 50
    """Number of items of each task and length, at least 2."""


class EvaluationSection(Section):
    """What stage 04 measures on the base, compressed and fine-tuned models."""

    tasks: Annotated[tuple[Text, ...], Field(min_length=1)] = ("hellaswag",)
    """lm-eval task names; `demo_hellaswag` is made from the demo's held-out text. Of RULER's tasks
    `ruler_vt`, `ruler_fwe`, `ruler_cwe`, `niah_single_1`, `niah_multikey_2` and `niah_multikey_3`
    are made by this project, without the network."""
    limit: Length | None = None
    """Maximum number of items per task, at least 2; null uses all."""
    num_fewshot: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of solved examples shown before each item, except RULER's, which have their own."""
    batch_size: Positive = 8
    """Requests per forward pass; answers are generated one at a time."""
    perplexity_samples: Positive = 256
    """Number of validation conversations for measuring perplexity."""
    divergence_samples: Count = 32
    """Number of those conversations on which every next token is compared with the base's, by
    position: Kullback-Leibler divergence, and how often the most likely tokens agree. Until the
    stage is done, the base's final hidden states are on disk (20b: 5.6 KiB per token). 0: none."""
    health_prompts: Annotated[int, Field(ge=0, le=8)] = 8
    """Number of fixed questions that are answered in a chat with each reasoning effort, to see
    whether answers end, loop, keep to harmony's channels, and how long they are. 0: none."""
    health_tokens: Positive = 1024
    """Maximum number of tokens of such an answer."""
    compare: Annotated[tuple[Place, ...], Incidental()] = ()
    """Other models to measure in the same way, each a column of the report: run directories, which
    stand for their fine-tuned model (without one, for the compressed one), or checkpoints of the
    base's sizes with mxfp4 or sparselong weights. `python 04_eval.py --compare RUN|PATH …` sets it;
    what was measured before is kept unless it has changed."""
    ruler: RulerSection = RulerSection()
    """RULER's tasks, if `tasks` names any."""

    @property
    def ruler_tasks(self) -> tuple[str, ...]:
        """Those of `tasks` that are RULER's."""
        return tuple(task for task in self.tasks if task in RULER_TASKS)
