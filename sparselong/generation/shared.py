"""Generation by several processes that share one model's experts and vocabulary.

    torchrun --nproc_per_node=4 answer.py

    def answer(model):
        for token in sparselong.generate(model, input_ids, 256): ...

    sparselong.share_model("runs/NAME/03_finetune/model", answer)

Every process opens its part. Only the first one calls `answer`; the others repeat each step of its
decoder, which tells them what it does. All processes have the same rows, so no rows are gathered:
each adds its experts' share of every token, and its columns of the logits. Attention, its cache and
everything else is computed by each. Tokens are those of one process.

A request that cannot be answered is refused before the others are told, and the next one may
follow. If the first process fails in a step that the others repeat, they end with its failure, and
later requests are refused even if `answer` catches it: the processes no longer agree.

With a prompt the others get the tokens that the first one's cache holds, most of which they have
not read, so that all continue it from the same position. For sampling they get its random numbers.

Steps are not captured in a CUDA graph: they contain exchanges, and run through the model's modules.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import GptOssForCausalLM

from sparselong.errors import StageError
from sparselong.files import read_json, why_unusable
from sparselong.generation.decoder import Decoder
from sparselong.model import NAME, load_model
from sparselong.parallel import ExchangeError, Mesh, explain_exchange, replicate_rows
from sparselong.processes import end_other_ranks, is_one_machine, joined_rank, local_rank
from sparselong.processes import world as ranks
from sparselong.runtime import default_device, using

Result = TypeVar("Result")


class _Step(IntEnum):
    """What the first process's decoder does."""

    OPEN, START, SAMPLE, PUT, ADVANCE, END = range(6)


class SharedModel:
    """A model of which each process holds a part, for `generate` in the first process.

    Args:
        model: this process's part.
        settings: those with which it was opened (`parallel.replicate_rows`).
    """

    def __init__(self, model: GptOssForCausalLM, settings: dict[str, Any]):
        self.model, self.settings = model, settings
        self._opened: weakref.ref[Decoder] | None = None
        self._failure: BaseException | None = None
        self._is_closed = False

    def open_decoder(self, most_tokens: int) -> Decoder:
        """Return a decoder that the other processes follow; it takes the place of an earlier one.

        Args:
            most_tokens: as for `Decoder`.

        Raises:
            ValueError: as from `Decoder`.
            StageError: as from `step`.
        """
        self._check()
        made = _LeadingDecoder(self, most_tokens)  # raises before the others are told
        with self.step():
            _tell(_Step.OPEN, most_tokens)
            self._opened = weakref.ref(made)
        return made

    @property
    def failure(self) -> BaseException | None:
        """What ended the other processes; requests are refused since."""
        return self._failure

    def is_open(self, decoder: Decoder) -> bool:
        """Return whether a decoder is the one that the other processes follow."""
        return self._opened is not None and self._opened() is decoder

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run a block that tells the other processes of a step and takes part in it.

        Whatever it raises ends the others, because they may wait for this process.

        Raises:
            StageError: an earlier step failed, or the model is closed.
        """
        self._check()
        try:
            with using(**self.settings):
                yield
        except BaseException as error:
            self._failure = error
            end_other_ranks(error)
            raise

    def close(self) -> None:
        """Let the other processes end, and refuse later requests.

        Raises:
            StageError: as from `step`.
        """
        with self.step():
            _tell(_Step.END)
        self._is_closed = True

    def _check(self) -> None:
        if self._is_closed:
            raise StageError(
                "a shared model was asked for tokens after the other processes had ended",
                "requests until the function that was passed to share_model returns",
                "a request after that",
                "generate inside that function",
            )
        if isinstance(self._failure, ExchangeError):  # `watch_ranks` finds the rank that failed
            raise self._failure
        if self._failure is not None:
            raise StageError(
                "a shared model cannot be used any more, because a step of it failed",
                "every step to succeed in all processes",
                f"{type(self._failure).__name__}: {self._failure}",
                "correct the cause named here, then start all processes again",
            ) from self._failure


class _LeadingDecoder(Decoder):
    """The first process's decoder."""

    def __init__(self, shared: SharedModel, most_tokens: int):
        self.shared = shared
        super().__init__(shared.model, most_tokens)

    def start(self, input_ids: torch.Tensor) -> torch.Tensor:
        self._check_open()
        self.check_prompt(input_ids)
        with self.shared.step():
            held = torch.tensor(self.history.tokens, dtype=torch.int64)
            _tell(_Step.START, len(held), input_ids.shape[1])
            _broadcast(torch.cat([held, input_ids[0].to("cpu", torch.int64)]))
            return super().start(input_ids)

    def set_sampling(self, drawn: torch.Tensor) -> None:
        self._check_open()
        with self.shared.step():
            _tell(_Step.SAMPLE, len(drawn))
            _broadcast(drawn)
            super().set_sampling(drawn)

    def put(self, token: int) -> None:
        self._check_open()
        with self.shared.step():
            _tell(_Step.PUT, token)
            super().put(token)

    def advance(self, is_sampled: bool = False) -> None:
        self._check_open()
        with self.shared.step():
            _tell(_Step.ADVANCE, is_sampled)
            super().advance(is_sampled)

    def _check_open(self) -> None:
        if not self.shared.is_open(self):
            raise ValueError(
                "decoder: another one of the same shared model was made after it; allowed: the "
                "last one, because the other processes hold only its cache"
            )


def open_whole(directory: Path, device: torch.device) -> GptOssForCausalLM:
    """Open a checkpoint on a device; inside of `using(**settings)` this process's part of it."""
    return load_model(directory, device=device, attn_implementation=NAME)


def _say_nothing(_: StageError) -> None:
    """Let a stuck process end without another message than the one that is printed."""


def share_model(
    directory: Path | str,
    lead: Callable[[Any], Result],
    open_part: Callable[[Path, torch.device], GptOssForCausalLM] = open_whole,
    tell: Callable[[StageError], None] = _say_nothing,
) -> Result | None:
    """Open a checkpoint in all processes that torchrun started, and call `lead` in the first.

    Without torchrun this process holds the whole model, and `lead` is called with it.

    Args:
        directory: a checkpoint, upstream's or that of a stage.
        lead: gets the model for `sparselong.generate`.
        open_part: opens it in each process, to which it gives a part if there are several.
        tell: called with the failure of another process if this one is stuck and must exit.

    Returns:
        What `lead` returns; None in the other processes.

    Raises:
        StageError: there is no such directory, the experts cannot be split evenly over the
            processes, these are on several machines or have shared a model before, the checkpoint
            is damaged, or a step failed.
    """
    directory = Path(directory)
    _check_call(directory)
    if joined_rank() is None:
        return lead(open_part(directory, default_device()))
    _check_processes(directory, int(os.environ["WORLD_SIZE"]))
    device = default_device()
    if device.type == "cuda":
        # A launcher may let each process see its own GPU alone.
        device = torch.device("cuda", local_rank() if torch.cuda.device_count() > 1 else 0)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        ranks.connect()
    mesh = ranks.join(1, dist.get_world_size())
    settings = replicate_rows(mesh)
    with using(**settings):
        model = open_part(directory, device)
    with ranks.watched(tell):
        result = lead_or_follow(model, settings, mesh, lead)
        ranks.leave()
    return result


def _check_call(directory: Path) -> None:
    """Raise unless this is the first call, for a directory."""
    if ranks.was_joined():
        raise StageError(
            "a second model cannot be shared by the same processes",
            "one call of share_model, after which torchrun's processes no longer know each other",
            f"another call, for {directory}",
            "do all requests in one call, or start the processes again for the other model",
        )
    if not directory.is_dir():
        raise StageError(
            f"{directory} cannot be shared",
            "a directory with a checkpoint",
            why_unusable(directory, "directory"),
            "correct it; download a model of the hub first, and pass the directory",
        )


def _check_processes(directory: Path, size: int) -> None:
    """Raise unless `size` processes are on one machine, and can share the experts evenly."""
    if not is_one_machine():
        raise StageError(
            "a model cannot be shared by processes on several machines",
            "processes on one machine, which exchange in every layer",
            "LOCAL_WORLD_SIZE is less than WORLD_SIZE",
            "torchrun --standalone --nproc_per_node=N ...",
        )
    fix = "download the checkpoint again, or redo the stage that wrote it"
    experts = read_json(directory / "config.json", fix).get("num_local_experts")
    if not isinstance(experts, int) or experts < 1 or experts % size == 0:
        return
    divisors = [n for n in range(1, experts + 1) if experts % n == 0]
    fewer = max(n for n in divisors if n < size)
    raise StageError(
        f"{experts} experts cannot be split evenly over {size} processes",
        f"a number of processes that divides {experts}: {', '.join(map(str, divisors))}",
        f"{size} processes",
        f"torchrun --nproc_per_node={fewer} ...",
    )


def lead_or_follow(
    model: GptOssForCausalLM, settings: dict[str, Any], mesh: Mesh, lead: Callable[[Any], Result]
) -> Result | None:
    """Call `lead` in the first process, and follow its decoders in the others until it returns.

    If it raises, the others are not told: they end as ranks do when one fails.

    Raises:
        StageError: a step failed, also if `lead` caught that failure.
    """
    if mesh.data_rank > 0:
        _follow(model, settings)
        return None
    shared = SharedModel(model, settings)
    result = lead(shared)
    shared.close()
    return result


def _follow(model: GptOssForCausalLM, settings: dict[str, Any]) -> None:
    decoder: Decoder | None = None
    while True:
        message = torch.empty(3, dtype=torch.int64)
        _broadcast(message)
        kind, value, count = message.tolist()
        if kind == _Step.END:
            return
        if kind == _Step.OPEN:
            del decoder  # before the next one's cache takes memory
            decoder = Decoder(model, value)
            continue
        assert decoder is not None
        if kind == _Step.PUT:
            decoder.put(value)
        elif kind == _Step.SAMPLE:
            drawn = torch.empty(value, dtype=torch.float64)
            _broadcast(drawn)
            decoder.set_sampling(drawn)
        else:
            with using(**settings):
                if kind == _Step.ADVANCE:
                    decoder.advance(bool(value))
                else:
                    _start(decoder, value, count)


def _start(decoder: Decoder, held: int, count: int) -> None:
    """Receive `held` tokens of the first process's cache and `count` of a prompt; start it."""
    tokens = torch.empty(held + count, dtype=torch.int64)
    _broadcast(tokens)
    decoder.history.tokens = tokens[:held].tolist()
    decoder.start(tokens[None, held:])


def _tell(step: _Step, *values: int) -> None:
    """Tell the other processes what this one does next."""
    _broadcast(torch.tensor([step, *values, 0, 0][:3]))


def _broadcast(tensor: torch.Tensor) -> None:
    """Send the first process's CPU tensor to all, however long the others wait for it."""
    explain_exchange("generation step", lambda: dist.broadcast(tensor, 0))
