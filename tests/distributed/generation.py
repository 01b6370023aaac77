"""Generates with a model that several processes share, or that one process holds."""

from __future__ import annotations

import functools
import os
import signal
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from sparselong.errors import StageError
from sparselong.generation import decoder as decoding
from sparselong.generation import shared
from sparselong.generation.decoder import Decoder, generate
from sparselong.model.loading import load_model
from sparselong.parallel.apply import replicate_rows
from sparselong.parallel.mesh import build_mesh
from sparselong.parallel.vocabulary.replicated import ReplicatedVocabulary
from sparselong.processes.watch import watch_ranks
from sparselong.runtime.settings import using

PROMPT, COUNT, CHUNK = 150, 12, 64
"""The prompt is longer than a sliding window, and is read in chunks."""
mesh_of = functools.cache(lambda size: build_mesh(1, expert_size=size))


def talk(model: Any) -> dict[str, Any]:
    """Return what several requests give, one of them abandoned, one ended by a stop token."""
    source = torch.Generator().manual_seed(5)
    prompt = torch.randint(1, 2048, (1, PROMPT), generator=source)
    greedy = list(generate(model, prompt, COUNT))
    abandoned = generate(model, prompt[:, :20], COUNT)
    begun = [next(abandoned) for _ in range(3)]
    sampled = list(generate(model, prompt[:, :9], COUNT, temperature=1.5, top_p=0.9, seed=3))
    stop = (greedy[4],)
    return {
        "greedy": greedy,
        "begun": begun,
        "sampled": sampled,
        "stopped": list(generate(model, prompt, COUNT, stop=stop)),
        "abandoned": resume(abandoned),
        "turns": talk_in_turns(model, prompt),
    }


def talk_in_turns(model: Any, prompt: torch.Tensor) -> list[Any]:
    """Return the tokens of turns that share a prefix, and how many each did not read again."""
    room, turns = PROMPT + 60, []
    decoder = Decoder(model, room) if hasattr(model, "lm_head") else model.open_decoder(room)
    for count, extra, temperature in ((8, 0, 1.5), (3, 9, 0.0), (5, 9, 2.0), (4, 30, 1.5)):
        ids = torch.cat([prompt, torch.arange(7, 7 + extra)[None]], 1)
        options = {"temperature": temperature, "top_k": 50, "seed": count}
        tokens = list(generate(model, ids, count, decoder=decoder, **options))
        turns.append((decoder.reused, tokens))
    tokens = generate(model, prompt, 9, decoder=decoder)
    heard = [next(tokens) for _ in range(4)]
    ids = torch.cat([prompt, torch.tensor([heard]), prompt[:, :5]], 1)
    turns.append(list(generate(model, ids, 5, decoder=decoder, temperature=1.0)))
    return [*turns, decoder.reused]


def resume(tokens: Any) -> str:
    """Return why an older generation cannot be continued, or that it can."""
    try:
        next(tokens)
    except ValueError as error:
        return str(error)
    return "continued"


def talk_alone(base: Path) -> dict[str, Any]:
    """Return what one process with the whole model says."""
    with mock.patch.object(decoding, "PROMPT_TOKENS", CHUNK):
        return talk(load_model(base, device=torch.device("cpu")))


def talk_together(base: Path, size: int, broken: str | None = None) -> dict[str, Any] | None:
    """Return what the first process says; the others follow and return None."""
    mesh = mesh_of(size)
    settings = replicate_rows(mesh)
    with using(**settings):
        model = load_model(base, device=torch.device("cpu"))
    with (
        mock.patch.object(decoding, "PROMPT_TOKENS", CHUNK),
        PIECES[broken]() if broken else nullcontext(),
    ):
        return shared.lead_or_follow(model, settings, mesh, talk)


def generate_until_one_is_killed(base: Path, which: int, folder: Path) -> str:
    """Kill process `which` at the third token; return why this one ended.

    Others write stderr to `folder`, so that the output of one ended from outside is available.
    """
    mesh = build_mesh(1, expert_size=dist.get_world_size())
    settings = replicate_rows(mesh)
    with using(**settings):
        model = load_model(base, device=torch.device("cpu"))
    sys.stderr = (folder / f"{dist.get_rank()}.txt").open("w", buffering=1)
    advance, steps = decoding.Decoder.advance, []

    def advance_or_die(self: decoding.Decoder, is_sampled: bool = False) -> None:
        steps.append(None)
        if dist.get_rank() == which and len(steps) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        advance(self, is_sampled)

    def answer(model: Any) -> list[int]:
        return list(generate(model, torch.arange(1, 12)[None], COUNT))

    with mock.patch.object(decoding.Decoder, "advance", advance_or_die):
        try:
            with watch_ranks(60.0, silence_seconds=2.0, beat_seconds=0.2):
                shared.lead_or_follow(model, settings, mesh, answer)
        except StageError as error:
            return str(error)
    return "none"


def fail_in_step(base: Path, moment: str, folder: Path) -> str:
    """Fail in the first process's second request, and let it catch that; return why this one ended.

    Args:
        base: the checkpoint.
        moment: `start` or `advance`, where it fails before it takes part in any exchange; `refused`
            for a prompt that is refused; `killed` between the requests.
        folder: as for `generate_until_one_is_killed`.
    """
    mesh = build_mesh(1, expert_size=dist.get_world_size())
    settings = replicate_rows(mesh)
    with using(**settings):
        model = load_model(base, device=torch.device("cpu"))
    sys.stderr = (folder / f"{dist.get_rank()}.txt").open("w", buffering=1)
    prompt, told = torch.arange(1, 12)[None], []

    def fail(*_: Any) -> None:
        raise RuntimeError("the first process alone")

    def attempt(model: Any, ids: torch.Tensor) -> None:
        try:
            told.append(list(generate(model, ids, 3)))
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")

    def answer(model: Any) -> None:
        attempt(model, prompt)
        if moment == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if moment == "refused":
            attempt(model, prompt.float())
            attempt(model, prompt + 10**6)
        else:
            with mock.patch.object(decoding.Decoder, moment, fail):
                attempt(model, prompt)
        attempt(model, prompt)

    try:
        with watch_ranks(60.0, silence_seconds=2.0, beat_seconds=0.2):
            shared.lead_or_follow(model, settings, mesh, answer)
    except Exception as error:
        told.append(f"{type(error).__name__}: {error}")
    return "\n".join(map(str, told))


@contextmanager
def _own_columns_only() -> Any:
    """Take this process's columns of the logits for those of all."""

    def gather(self: Any, part: torch.Tensor, vocab: int) -> torch.Tensor:
        missing = vocab - part.shape[-1]
        return torch.nn.functional.pad(part, (0, missing), value=-100.0)

    with mock.patch.object(ReplicatedVocabulary, "gather_logits", gather):
        yield


@contextmanager
def _own_experts_only() -> Any:
    """Take this process's share of the experts' sum for all of it."""
    from sparselong.parallel.experts import exchange

    def first(parts: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(parts[0])

    with mock.patch.object(exchange, "sum_parts", first):
        yield


PIECES = {"logits of all": _own_columns_only, "experts of all": _own_experts_only}
