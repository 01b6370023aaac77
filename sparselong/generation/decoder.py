"""Fast generation at batch 1: prefill the prompt, then decode one token at a time.

`model.generate(...)` also works on packed models and is the general method. This module is faster:
the cache has a fixed size, sliding-window layers cache only their window, and one step (`step.py`)
is captured in a CUDA graph once and replayed for every token, with position and token on the
device. A greedy token enters the next step without passing through the host, which reads it while
that step runs. On a CPU the same loop runs the step in plain torch.

The prompt is prefilled in chunks, and keys and values go directly into the step's cache
(`prompt_cache.py`), so temporary memory does not grow with the prompt.

Several processes may share a model (`shared.py`). A step then contains exchanges: it is not
captured, and runs through the model's modules.

Sampling uses transformers' logits processors. Not supported: batches, beams, unmerged adapters,
models whose cache does not fit the device.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    Cache,
    GptOssForCausalLM,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from sparselong.errors import StageError
from sparselong.generation.prompt_cache import make_prompt_cache
from sparselong.generation.step import KernelStep, TorchStep, compute_logits, make_caches
from sparselong.kernels.decode import decode_token, encode_token, holds_nan
from sparselong.model import PartialHead
from sparselong.runtime import using

if TYPE_CHECKING:
    from sparselong.generation.shared import SharedModel

WARM_UP_STEPS = 2
PROMPT_TOKENS = 1024
"""Tokens per prefill chunk; with fewer, a GPU is bound by kernel launches."""
EXPERT_TOKENS = 512
"""Tokens per slice of an expert pass within a chunk: 35 MB for 20b, as much as its attention needs
anyway; 1,024 would take 71."""


class Decoder:
    """Model with a cache for `most_tokens` positions and a decoding step, captured on a GPU.

    Construct it while no other thread uses the GPU: CUDA graph capture fails otherwise.

    Args:
        model: gpt-oss in eval mode, on one device.
        most_tokens: prompt and generated tokens together.
        use_graph: on a GPU, replay a captured step; False launches its kernels individually. A
            model of which this process holds a part is never captured.

    Raises:
        ValueError: `most_tokens` exceeds the model's positions, the model is on a GPU other than
            the current one, or `KernelStep` does not support the model.
    """

    def __init__(self, model: GptOssForCausalLM, most_tokens: int, use_graph: bool = True):
        positions = model.config.max_position_embeddings
        if most_tokens > positions:
            raise ValueError(
                f"prompt and generated tokens: {most_tokens}; allowed: the model's {positions}"
            )
        self.model, self.most_tokens = model, most_tokens
        self.is_cuda = model.device.type == "cuda"
        if self.is_cuda:
            _check_current(model.device.index, torch.cuda.current_device())
        self.caches = make_caches(model, most_tokens)
        has_kernels = self.is_cuda and not isinstance(model.lm_head, PartialHead)
        kind = KernelStep if has_kernels else TorchStep
        with torch.no_grad():
            self.step = kind(model, self.caches, most_tokens)
            self._graph = self._capture() if has_kernels and use_graph else None

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Compile the kernels, then capture a step; `start` overwrites what these steps write."""
        graph = torch.cuda.CUDAGraph()
        stream = _make_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self.step.position.zero_()
                self.step.run()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                self.step.run()
            finally:
                graph.capture_end()
        return graph

    @torch.no_grad()
    def start(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Prefill the cache with a prompt [1, tokens].

        Returns:
            Logits of the last token, [vocab].

        Raises:
            ValueError: As from `check_prompt`.
        """
        self.check_prompt(input_ids)
        tokens = input_ids.shape[1]
        past = make_prompt_cache(self.caches)
        for chunk in input_ids.to(self.model.device).split(PROMPT_TOKENS, 1):
            last = self._read(chunk, past)
        self.step.position.fill_(tokens - 1)
        return compute_logits(self.model, last)[0, -1]

    def check_prompt(self, input_ids: torch.Tensor) -> None:
        """Raise ValueError unless these are a prompt [1, tokens] of the model that fits the cache.

        On a GPU the host waits for the prompt.
        """
        if input_ids.dim() != 2 or len(input_ids) != 1:
            raise ValueError(f"input_ids: {list(input_ids.shape)}; allowed: [1, tokens]")
        tokens = input_ids.shape[1]
        if not 0 < tokens < self.most_tokens:
            raise ValueError(
                f"input_ids: {tokens} tokens; allowed: 1 to {self.most_tokens - 1}, one less than "
                "the cache holds"
            )
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids: {input_ids.dtype}; allowed: torch.int64, torch.int32")
        least, most = map(int, input_ids.aminmax())
        vocab: int = self.model.config.vocab_size  # pyright: ignore[reportAssignmentType]
        if least < 0 or most >= vocab:
            raise ValueError(f"input_ids: tokens from {least} to {most}; allowed: 0 to {vocab - 1}")

    def _read(self, chunk: torch.Tensor, past: Cache) -> torch.Tensor:
        """Prefill a chunk [1, tokens]; return its last token's hidden state [1, 1, width]."""
        with using(inference_tokens=EXPERT_TOKENS):
            outputs: Any = self.model.model(input_ids=chunk, past_key_values=past, use_cache=True)
        return outputs.last_hidden_state[:, -1:].clone()  # a view would keep the rest alive

    def put(self, token: int) -> None:
        """Set the token that the next `advance` takes as input."""
        self.step.word.fill_(encode_token(token))

    @torch.no_grad()
    def advance(self) -> None:
        """Run one step on the token in `step.word`; it sets `step.logits` and the next word."""
        if self._graph is None:
            self.step.run()
        else:
            self._graph.replay()


@functools.cache
def _make_stream(device: int) -> torch.cuda.Stream:
    """Return the GPU's capture stream, created once and kept for the life of the process.

    It is created through the CUDA runtime because torch's first stream allocates its whole pool of
    128, and older `torch.cuda.graph` creates one even if given another. With the pool, a process
    that captured took 73 MB more of an H200, outside torch's memory, than one that did not; the
    pool's share of that was not measured. Unlike torch's streams, this one synchronizes with the
    default stream, so work that another thread puts there aborts a capture.
    """
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.check_error(torch.cuda.cudart().cudaStreamCreate(ctypes.addressof(handle)))
    return torch.cuda.ExternalStream(handle.value, device=device)


@torch.no_grad()
def generate(
    model: GptOssForCausalLM | SharedModel,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: tuple[int, ...] = (),
    decoder: Decoder | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow a prompt as they are generated.

    Args:
        model: gpt-oss in eval mode; packed, or on a CPU also transformers' unpacked model; or the
            one that `share_model` passes.
        input_ids: int64 [1, tokens].
        max_new_tokens: most tokens to generate.
        temperature: 0 takes the token with the largest logit, the first of ties; above 0 samples.
        top_p: probability mass to sample from.
        seed: seed for sampling.
        stop: tokens that end the generation; the stopping token is yielded.
        decoder: decoder with enough room to reuse; None creates one.

    Raises:
        ValueError: An argument is out of range, or `KernelStep` does not support the model.
        StageError: A logit is NaN; the message names the token.
    """
    if max_new_tokens < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(
            f"max_new_tokens, temperature, top_p: {max_new_tokens}, {temperature}, {top_p}; "
            "allowed: at least 1, at least 0 and finite, above 0 and at most 1"
        )
    needed = input_ids.shape[-1] + max_new_tokens
    if decoder is None:
        is_whole = isinstance(model, GptOssForCausalLM)
        decoder = Decoder(model, needed) if is_whole else model.open_decoder(needed)
    if decoder.most_tokens < needed:
        raise ValueError(f"decoder: room for {decoder.most_tokens} tokens; required: {needed}")
    logits = decoder.start(input_ids)
    if temperature == 0:
        tokens = _pick_greedily(decoder, logits, max_new_tokens)
    else:
        tokens = _sample(decoder, logits, max_new_tokens, temperature, top_p, seed)
    for token in tokens:
        yield token
        if token in stop:
            return


def _pick_greedily(decoder: Decoder, logits: torch.Tensor, count: int) -> Iterator[int]:
    """Yield the tokens of the largest logits; the host reads each while the next step runs."""
    _check(logits, 0)
    token = int(logits.argmax())
    decoder.put(token)
    pinned = torch.zeros(2, dtype=torch.int64, pin_memory=decoder.is_cuda)
    events = [torch.cuda.Event() for _ in range(2)] if decoder.is_cuda else []

    def launch(n: int) -> None:
        decoder.advance()
        pinned[n % 2 : n % 2 + 1].copy_(decoder.step.word, non_blocking=True)
        if events:
            events[n % 2].record()

    for n in range(count):
        if n == 0 and count > 1:
            launch(0)
        yield token
        if n + 1 == count:
            return
        if n + 2 < count:
            launch(n + 1)
        if events:
            events[n % 2].synchronize()
        word = int(pinned[n % 2])
        if holds_nan(word):
            raise _nan_error(n + 1)
        token = decode_token(word)


def _sample(
    decoder: Decoder,
    logits: torch.Tensor,
    count: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[int]:
    """Yield tokens sampled from the processed distribution; each passes through the host."""
    generator = torch.Generator(decoder.model.device).manual_seed(seed)
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    no_ids: Any = torch.empty((1, 0), dtype=torch.int64, device=decoder.model.device)
    for n in range(count):
        _check(logits, n)
        scores = processors(no_ids, logits[None].float())  # pyright: ignore[reportArgumentType]
        token = int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
        yield token
        if n + 1 < count:
            decoder.put(token)
            decoder.advance()
            logits = decoder.step.logits


def _check_current(index: int, current: int) -> None:
    if index != current:  # launches, events and the graph would go to the other GPU
        raise ValueError(
            f"model: on cuda:{index}, the current device is cuda:{current}; allowed: the same. "
            f"Call this under `with torch.cuda.device({index})`"
        )


def _check(logits: torch.Tensor, token: int) -> None:
    if bool(logits.isnan().any()):
        raise _nan_error(token)


def _nan_error(token: int) -> StageError:
    return StageError(
        f"generated token {token} has NaN logits",
        "finite logits",
        "NaN",
        "the checkpoint is damaged, or its activations exceed bfloat16's range: evaluate it",
    )
