"""Measures a small model in one process, or in several that hold parts of it or all of it."""

from __future__ import annotations

import functools
import random
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sparselong.config import load
from sparselong.evaluate import answering, divergence, perplexity, rank, scoring
from sparselong.evaluate.spread import Spread
from sparselong.evaluate.work import Mark, Prompt, Questions, Request, Work
from sparselong.model.loading import load_model
from sparselong.model.tokenizer import load_tokenizer
from sparselong.model.vocabulary import PartialHead
from sparselong.parallel.apply import shard_model
from sparselong.parallel.mesh import build_mesh
from sparselong.processes import sharing, world
from sparselong.processes.sharing import Sharing
from sparselong.runtime.settings import using
from tests.conftest import ROOT

VOCAB, BATCH_SIZE = 2048, 2
PLAN = Sharing("auto", 2, 60 * 2**30, 19 * 2**30, 23 * 2**30, "auto", "gpu", 0, 64 * 2**30)
mesh_of = functools.cache(lambda size: build_mesh(1, expert_size=size))


def draw(count: int, seed: int = 0) -> tuple[list[Request], list[perplexity.Sample]]:
    """Return texts with one to six scored tokens, and conversations."""
    source = random.Random(seed)
    texts = [[source.randrange(VOCAB) for _ in range(source.randint(8, 90))] for _ in range(count)]
    samples = [
        perplexity.Sample(text, [source.random() < 0.6 for _ in text]) for text in texts[::-1]
    ]
    return [Request(text, source.randint(1, 6)) for text in texts], samples


@torch.no_grad()
def prefer(model: Any, requests: list[Request]) -> list[Request]:
    """Return the texts, the scored tokens of every second one replaced by the most likely ones."""
    changed = []
    for number, (tokens, scored) in enumerate(requests):
        if number % 2:
            tokens = tokens[:-scored]
            for _ in range(scored):
                logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
                tokens = [*tokens, int(logits.argmax())]
        changed.append(Request(tokens, scored))
    return changed


def measure(
    base: Path,
    requests: Any,
    samples: Any,
    expert_size: int,
    broken: str | None = None,
    on_gpu: bool = False,
) -> dict[str, Any]:
    """Return this process's figures; every process computes a part and has all of them."""
    mesh = mesh_of(expert_size)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    with using(**shard_model(mesh)), PIECES[broken]() if broken else nullcontext():
        model = load_model(base, device=device)
        assert isinstance(model.lm_head, PartialHead) == (expert_size > 1)
        return measure_with(model, requests, samples, Spread(mesh))


def measure_with(model: Any, requests: Any, samples: Any, spread: Spread) -> dict[str, Any]:
    """Return the figures of an opened model, and the shapes of this process's passes."""
    passes: list[tuple[int, ...]] = []
    hook = model.model.register_forward_pre_hook(lambda _, args: passes.append((*args[0].shape,)))
    with hook:
        answers = scoring.score(model, requests, BATCH_SIZE, spread)
        found = perplexity.measure(model, samples, BATCH_SIZE, spread)
    return {"answers": answers, "perplexity": found, "passes": passes}


def draw_prompts(count: int) -> list[Prompt]:
    """Return prompts of several lengths, one of them longer than a chunk that is read at once."""
    source = random.Random(3)
    lengths = [1100, *(source.randint(3, 90) for _ in range(count - 1))]
    texts = [[source.randrange(300, VOCAB) for _ in range(length)] for length in lengths]
    return [Prompt(text, len(text), 5, []) for text in texts]


def continue_all(base: Path, prompts: list[Prompt], expert_size: int) -> dict[str, Any]:
    """Return each prompt's tokens, and how many of the prompts this process read."""
    mesh = mesh_of(expert_size)
    with using(**shard_model(mesh)):
        model = load_model(base, device=torch.device("cpu"))
        read: list[int] = []
        original = answering._continue

        def count(decoder: Any, prompt: Prompt, *rest: Any) -> Any:
            read.append(prompt.tokens)
            return original(decoder, prompt, *rest)

        with mock.patch.object(answering, "_continue", count):
            found = answering.continue_prompts(model, prompts, load_tokenizer(base), Spread(mesh))
    return {"tokens": [each.tokens for each in found], "read": read}


def compare(
    base: Path, other: Path, samples: Any, folder: Path, expert_size: int
) -> dict[str, Any]:
    """Return how far a model is from the base; every process has the whole result."""
    mesh = mesh_of(expert_size)
    with using(**shard_model(mesh)):
        for directory in (base, other):
            model = load_model(directory, device=torch.device("cpu"))
            if directory == base:
                divergence.save_states(model, samples, BATCH_SIZE, Spread(mesh), folder)
        return divergence.measure(model, samples, BATCH_SIZE, Spread(mesh), folder)


@contextmanager
def _own_results_only() -> Any:
    """Take this process's results for all."""
    with mock.patch.object(Spread, "collect", lambda self, value: [value] * self.size):
        yield


@contextmanager
def _first_token_of_shard() -> Any:
    """Take the shard's most likely token for the vocabulary's."""
    from sparselong.parallel.vocabulary.sharded import ShardedVocabulary

    original = ShardedVocabulary.score

    def score(self: Any, hidden: Any, table: Any, labels: Any, vocab: int) -> Any:
        scores, _ = original(self, hidden, table, labels, vocab)
        return scores, (hidden @ table.T).argmax(1)

    with mock.patch.object(ShardedVocabulary, "score", score):
        yield


PIECES = {"results of others": _own_results_only, "best token of all": _first_token_of_shard}


def run_out_of_memory(base: Path, requests: Any, samples: Any, folder: Path) -> None:
    """Measure as a rank of stage 04; the second rank runs out of memory."""
    told = [(sample.input_ids, sample.supervised) for sample in samples]
    work = Work(str(folder), str(base), [], Questions(requests, [], []), told)
    config = load(ROOT / "configs/tiny.yaml", [f"evaluation.batch_size={BATCH_SIZE}"])
    mesh = mesh_of(2)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    with (
        mock.patch.object(sharing, "_decided", PLAN),
        mock.patch.object(world, "_mesh", mesh),
        mock.patch.object(scoring, "score", fail) if mesh.data_rank == 1 else nullcontext(),
    ):
        rank._measure(Mark("base", str(base), "", True), work, config, mesh, folder)
