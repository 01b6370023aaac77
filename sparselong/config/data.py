"""The config's section `data`: see schema.py."""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from sparselong.config.keys import Section
from sparselong.config.texts import Place
from sparselong.config.values import Scale

TrainOn = Literal["assistant", "final", "last_turn", "all"]


class Share(Section):
    """One of several sources of conversations."""

    source: Place
    """A file or a hub dataset."""
    weight: Scale | None = None
    """The source's share of the training examples, relative to the other weights."""


class DataSection(Section):
    """Conversations to fine-tune on."""

    train: Annotated[
        Annotated[Place, Tag("one")] | Annotated[tuple[Share, ...], Tag("several")],
        Discriminator(lambda value: "several" if isinstance(value, list | tuple) else "one"),
    ] = "HuggingFaceH4/Multilingual-Thinking"
    """A file of JSON Lines, Parquet (`.parquet`) or CSV (`.csv`), a hub dataset, or `demo` for
    conversations made from the Python library's documentation. A row is known by its keys:
    `messages` of `{"role", "content"}` (with `tools`), ShareGPT's `conversations`, Alpaca's
    `instruction`, `text`, or `input_ids`. Several sources are a list of `{source: …, weight: …}`:
    rows of each, drawn by `seed`, are repeated or left out, so that the number of training
    examples from each is proportional to its weight and the total is unchanged. Without weights,
    each row is used once."""
    validation: Place | None = None
    """Conversations in the same forms; null holds out `validation_fraction` of `train`."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Fraction of each source's conversations held out for validation if `validation` is null; at
    least one of each source that has two."""
    train_on: TrainOn = "assistant"
    """`assistant` trains on the assistant's turns only: reasoning that the template writes, tool
    calls and answers, with their ends. `final` leaves out reasoning and tool calls; `last_turn`
    trains on what follows the last question that is answered; `all` trains on every token. Rows of
    `text` have no turns and are trained whole, rows of `input_ids` as their `labels` say."""
    date: datetime.date | None = None
    """Date that the chat template writes into each conversation (gpt-oss's writes today's), as
    2026-01-31. null takes the day on which the run's first stage read the conversations, and keeps
    it for all later stages (`date.txt` in the run directory)."""

    @property
    def shares(self) -> tuple[Share, ...]:
        """The sources of `train`, one or several."""
        return (Share(source=self.train),) if isinstance(self.train, str) else self.train

    @property
    def named(self) -> dict[str, str]:
        """Each source by the key that names it, such as `data.train` or `data.train[0].source`."""
        if isinstance(self.train, str):
            found = {"data.train": self.train}
        else:
            found = {f"data.train[{i}].source": each.source for i, each in enumerate(self.train)}
        return found | ({"data.validation": self.validation} if self.validation else {})
