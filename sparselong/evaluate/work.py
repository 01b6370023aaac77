"""What stage 04's process hands to the ranks that measure models together. Needs no torch.

The ranks know no tasks and no data: they get texts, and answer with likelihoods and texts. The file
is written once, before they start, and is the same for all of them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from sparselong.files import load_json, write_atomically
from sparselong.run import Stage

WORK = "work.json"
BASE = "base"
"""Name of the model with which the others are compared."""
MEMORY_FIX = (
    "lower evaluation.batch_size, or the longest of evaluation.ruler.lengths, or share experts and "
    "vocabulary among more processes (expert_parallel_degree)"
)
"""What helps if a GPU runs out of memory while a model is measured."""


class Request(NamedTuple):
    """Tokens of a text; the likelihood of the last `scored` of them is wanted."""

    tokens: list[int]
    scored: int


class Prompt(NamedTuple):
    """A text that the model continues with its most likely tokens.

    Attributes:
        content: the text, or its tokens if these are no plain text.
        tokens: number of its last tokens that are read.
        new_tokens: most tokens to generate.
        stops: texts that end the answer and are no part of it.
    """

    content: str | list[int]
    tokens: int
    new_tokens: int
    stops: list[str]


class Questions(NamedTuple):
    """What is asked of a model.

    Attributes:
        requests: likelihoods that lm-eval's tasks want.
        prompts: those that they want to be continued.
        chats: prompts of chats (health.py).
    """

    requests: list[Request]
    prompts: list[Prompt]
    chats: list[Prompt]


class Answers(NamedTuple):
    """A model's answers to tasks' questions, in their order.

    Attributes:
        likelihoods: of each request in nats, and whether its tokens are the most likely ones.
        texts: the continuation of each prompt.
    """

    likelihoods: list[tuple[float, bool]]
    texts: list[str]


class Mark(NamedTuple):
    """A model to measure.

    Attributes:
        name: as in the report.
        directory: its checkpoint.
        fingerprint: of its files, and of the questions and conversations.
        has_base_head: whether its lm_head is the base's.
        only_states: whether it is the base, measured before, whose hidden states are needed again.
    """

    name: str
    directory: str
    fingerprint: str
    has_base_head: bool
    only_states: bool = False


@dataclass(frozen=True)
class Work:
    """What the ranks measure.

    Attributes:
        run_dir: the run's directory; its config.yaml has the settings.
        tokenizer: directory of the base, whose tokenizer all models get.
        models: those to measure.
        questions: those of all tasks.
        samples: tokens of each conversation, and which of them are supervised.
    """

    run_dir: str
    tokenizer: str
    models: list[Mark]
    questions: Questions
    samples: list[tuple[list[int], list[bool]]]

    def write(self, path: Path) -> None:
        """Write the work to a file."""
        write_atomically(path, json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Work:
        """Return the work that `write` wrote."""
        found = load_json(path)
        requests, *prompts = found.pop("questions")
        read = ([Prompt(*each) for each in some] for some in prompts)
        questions = Questions([Request(*each) for each in requests], *read)
        found["models"] = [Mark(*each) for each in found["models"]]
        return cls(**found, questions=questions)

    def digest(self, name: str) -> str:
        """Return a hash of what a model is and of what it is measured on."""
        (mark,) = (mark for mark in self.models if mark.name == name)
        text = json.dumps([mark, self.questions, self.samples])
        return hashlib.sha256(text.encode()).hexdigest()


def scores_path(folder: Path, model: str) -> Path:
    """Return the file in which rank 0 leaves a model's answers."""
    return folder / f"{model}.scores.json"


def rank_arguments(stage: Stage) -> list[str]:
    """Return the Python arguments that run a rank of the stage."""
    return ["-m", "sparselong.evaluate.rank", str(stage.dir / WORK)]
