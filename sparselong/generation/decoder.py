"""Generation at batch 1: a prompt through the model, then one token after another.

`model.generate(...)` works on packed models and is the general way. This one is for speed: the
cache has a fixed size, sliding layers keep their window alone, and one step (`step.py`) is
captured in a CUDA graph once and replayed for every token, its position and its token on the
device. A greedy token goes into the next step without passing the host, which reads it while the
next step runs. On a CPU the same loop runs the step in plain torch.

A prompt goes through the model in chunks, its keys and values straight into the step's cache
(`prompt_cache.py`): what its pass holds for a moment does not grow with the prompt.

Sampling goes through transformers' own logits processors. Left out: batches, beams, adapters that
are not merged, models whose cache does not fit the device.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterator
from typing import Any

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
from sparselong.generation.step import KernelStep, TorchStep, make_caches
from sparselong.runtime import using

WARM_UP_STEPS = 2
PROMPT_TOKENS = 1024
"""Tokens of a prompt that go through the model at once; with fewer a GPU waits for launches."""
EXPERT_TOKENS = 512
"""Of these, tokens that go through a layer's experts at once: 35 MB of 20b, which its attention
takes as well; 1,024 would hold 71."""


class Decoder:
    """A model with a cache for `most_tokens` positions, and its step, captured on a GPU.

    To be made while no other thread uses the GPU: a capture does not bear it.

    Args:
        model: gpt-oss in eval mode, on one device.
        most_tokens: prompt and generated tokens together.
        use_graph: on a GPU, replay a captured step; False launches its kernels one by one.

    Raises:
        ValueError: more positions than the model has; a GPU that is not the current device; or see
            `KernelStep`.
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
        kind = KernelStep if self.is_cuda else TorchStep
        with torch.no_grad():
            self.step = kind(model, self.caches, most_tokens)
            self._graph = self._capture() if self.is_cuda and use_graph else None

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Compiles the kernels, then captures a step. What it writes, `start` overwrites."""
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
        """Runs a prompt [1, tokens] through the model, into the cache.

        Returns:
            The last token's logits, [vocab].

        Raises:
            ValueError: no tokens, several rows, or more than the cache holds.
        """
        if input_ids.dim() != 2 or len(input_ids) != 1:
            raise ValueError(f"input_ids: {list(input_ids.shape)}; allowed: [1, tokens]")
        tokens = input_ids.shape[1]
        if not 0 < tokens < self.most_tokens:
            raise ValueError(
                f"input_ids: {tokens} tokens; allowed: 1 to {self.most_tokens - 1}, one less than "
                "the cache holds"
            )
        past = make_prompt_cache(self.caches)
        for chunk in input_ids.to(self.model.device).split(PROMPT_TOKENS, 1):
            last = self._read(chunk, past)
        self.step.position.fill_(tokens - 1)
        return self.model.lm_head(last)[0, -1]

    def _read(self, chunk: torch.Tensor, past: Cache) -> torch.Tensor:
        """A chunk [1, tokens] into the cache; its last token's hidden state [1, 1, width]."""
        with using(inference_tokens=EXPERT_TOKENS):
            outputs: Any = self.model.model(input_ids=chunk, past_key_values=past, use_cache=True)
        return outputs.last_hidden_state[:, -1:].clone()  # a view would hold the others

    def put(self, token: int) -> None:
        """The token that the next `advance` takes in."""
        self.step.word.fill_(0x7FFFFFFF - token)

    @torch.no_grad()
    def advance(self) -> None:
        """One step: takes the token in `step.word`, leaves `step.logits` and the largest's word."""
        if self._graph is None:
            self.step.run()
        else:
            self._graph.replay()


@functools.cache
def _make_stream(device: int) -> torch.cuda.Stream:
    """A stream of a GPU to capture on, one for the process and as long as it.

    Made by itself because torch's first stream comes with its whole pool of 128, and older
    `torch.cuda.graph` makes one even where it is given another. With the pool a process that
    captured took 73 MB more of an H200, beside torch's memory, than one that did not; what of that
    is the pool's was not measured. Unlike torch's, the stream waits for the default stream, so that
    work which another thread puts there breaks a capture off.
    """
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.check_error(torch.cuda.cudart().cudaStreamCreate(ctypes.addressof(handle)))
    return torch.cuda.ExternalStream(handle.value, device=device)


@torch.no_grad()
def generate(
    model: GptOssForCausalLM,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: tuple[int, ...] = (),
    decoder: Decoder | None = None,
) -> Iterator[int]:
    """Yields the tokens that follow a prompt, one by one, as they are made.

    Args:
        model: gpt-oss in eval mode, packed or on a CPU as transformers has it.
        input_ids: int64 [1, tokens].
        max_new_tokens: how many at most.
        temperature: 0: the token of the largest logit, the first of equals; above: sampled.
        top_p: share of probability that is sampled from.
        seed: of sampling.
        stop: tokens after which nothing follows; the stopping token is yielded.
        decoder: one with enough room, to be used again; None: made here.

    Raises:
        ValueError: an argument is not as above, or the model is not one that `KernelStep` takes.
        StageError: a logit is NaN; names the token.
    """
    if max_new_tokens < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(
            f"max_new_tokens, temperature, top_p: {max_new_tokens}, {temperature}, {top_p}; "
            "allowed: at least 1, at least 0 and finite, above 0 and at most 1"
        )
    needed = input_ids.shape[-1] + max_new_tokens
    decoder = decoder or Decoder(model, needed)
    if decoder.most_tokens < needed:
        raise ValueError(f"decoder: room for {decoder.most_tokens} tokens; needed: {needed}")
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
    """Tokens of the largest logits; a step is always under way while the host reads the last."""
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
        if word >> 32 > 0x7F800000:
            raise _nan(n + 1)
        token = 0x7FFFFFFF - (word & 0x7FFFFFFF)


def _sample(
    decoder: Decoder,
    logits: torch.Tensor,
    count: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[int]:
    """Tokens drawn from the processed distribution; every one passes the host."""
    generator = torch.Generator(decoder.model.device).manual_seed(seed)
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    nothing: Any = torch.empty((1, 0), dtype=torch.int64, device=decoder.model.device)
    for n in range(count):
        _check(logits, n)
        scores = processors(nothing, logits[None].float())  # pyright: ignore[reportArgumentType]
        token = int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
        yield token
        if n + 1 < count:
            decoder.put(token)
            decoder.advance()
            logits = decoder.step.logits


def _check_current(index: int, current: int) -> None:
    if index != current:  # launches, events and the graph would be the other GPU's
        raise ValueError(
            f"model: on cuda:{index}, the current device is cuda:{current}; allowed: the same. "
            f"Call this under `with torch.cuda.device({index})`"
        )


def _check(logits: torch.Tensor, token: int) -> None:
    if bool(logits.isnan().any()):
        raise _nan(token)


def _nan(token: int) -> StageError:
    return StageError(
        f"generated token {token} has no probability",
        "numbers as logits",
        "NaN",
        "the checkpoint is damaged, or its activations leave bfloat16's range: evaluate it",
    )
