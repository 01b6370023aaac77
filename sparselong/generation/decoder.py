"""Fast generation at batch 1: prefill the prompt, then decode one token at a time.

`model.generate(...)` also works on packed models and is the general method. This module is faster:
the cache has a fixed size, sliding-window layers cache only their window, and one step (`step.py`)
is captured in a CUDA graph once and replayed for every token, with position and token on the
device. A token enters the next step without passing through the host, which reads it while that
step runs. The step takes the token with the largest logit; for sampling a second graph, captured at
first use, replaces it with a drawn one (`sampling.py`). On a CPU the same loop runs the step in
plain torch.

The prompt is prefilled in chunks, and keys and values go directly into the step's cache
(`prompt_cache.py`), so temporary memory does not grow with the prompt. A decoder's next prompt
continues from the longest prefix that the cache still holds (`snapshots.py`).

Several processes may share a model (`shared.py`). A step then contains exchanges: it is not
captured, and runs through the model's modules.

Not supported: batches, beams, unmerged adapters, models whose cache does not fit the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, GptOssForCausalLM

from sparselong.errors import StageError
from sparselong.generation.graph import capture_graph
from sparselong.generation.prompt_cache import make_prompt_cache
from sparselong.generation.sampling import Sampler, Sampling
from sparselong.generation.snapshots import UNKNOWN, History
from sparselong.generation.step import KernelStep, TorchStep, compute_logits, make_caches
from sparselong.kernels.decode import decode_token, encode_token, holds_finite, replace_token
from sparselong.model import PartialHead
from sparselong.runtime import using

if TYPE_CHECKING:
    from sparselong.generation.shared import SharedModel

PROMPT_TOKENS = 1024
"""Tokens per prefill chunk; with fewer, a GPU is bound by kernel launches."""
EXPERT_TOKENS = 512
"""Tokens per slice of an expert pass within a chunk: 35 MB for 20b, as much as its attention needs
anyway; 1,024 would take 71."""


class Decoder:
    """Model with a cache for `most_tokens` positions and a decoding step, captured on a GPU.

    Construct it, and first set sampling, while no other thread uses the GPU: CUDA graph capture
    fails otherwise.

    Attributes:
        reused: number of the last prompt's tokens that were not read again.
        prompts: number of prompts that were started.

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
        self.history, self.reused, self.prompts = History(self.caches), 0, 0
        self._next = UNKNOWN
        self._sampler: Sampler | None = None
        self._sampling_graph: torch.cuda.CUDAGraph | None = None
        has_kernels = self.is_cuda and not isinstance(model.lm_head, PartialHead)
        kind = KernelStep if has_kernels else TorchStep
        with torch.no_grad():
            self.step = kind(model, self.caches, most_tokens)
            self._graph = self._capture() if has_kernels and use_graph else None

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Capture a step; `start` overwrites what its warm-up writes."""

        def warm_up() -> None:
            self.step.position.zero_()
            self.step.run()

        return capture_graph(self.step.run, warm_up)

    @torch.no_grad()
    def start(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Prefill the cache with a prompt [1, tokens], after the prefix that it holds already.

        Returns:
            Logits of the last token, [vocab].

        Raises:
            ValueError: As from `check_prompt`.
        """
        self.check_prompt(input_ids)
        tokens = input_ids[0].tolist()
        self.prompts += 1
        begin = self.reused = self.history.resume(tokens)
        past = make_prompt_cache(self.caches, begin)
        for chunk in input_ids[:, begin:].to(self.model.device).split(PROMPT_TOKENS, 1):
            end = begin + chunk.shape[1]
            with self.history.writing(tokens[begin:end]):
                last = self._read(chunk, past)
            self.history.snapshot()
            begin = end
        self.step.position.fill_(len(tokens) - 1)
        self._next = UNKNOWN
        return compute_logits(self.model, last)[0, -1]

    def forget(self) -> None:
        """Read the next prompt whole, because the model has changed or to measure that."""
        self.history.clear()

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

    @torch.no_grad()
    def set_sampling(self, drawn: torch.Tensor) -> None:
        """Set how the tokens after a prompt, which has been started, are sampled.

        Args:
            drawn: settings and random numbers, one a token, as from `Sampling.draw`.
        """
        if self._sampler is None:
            vocab: Any = self.model.config.vocab_size
            self._sampler = Sampler(vocab, self.most_tokens, self.model.device)
            if self._graph is not None:
                self._sampling_graph = capture_graph(self._sample, self._sample)
        self._sampler.load(drawn, len(self.history.tokens) - 1)

    @torch.no_grad()
    def pick(self, logits: torch.Tensor) -> int:
        """Return the token sampled from the logits of the last position, [vocab]."""
        assert self._sampler is not None
        return int(self._sampler.pick(logits, self.step.position))

    def put(self, token: int) -> None:
        """Set the token that the next `advance` takes as input."""
        self.step.word.fill_(encode_token(token))
        self._next = token

    @torch.no_grad()
    def advance(self, is_sampled: bool = False) -> None:
        """Run one step on the token in `step.word`; it sets `step.logits` and the next word.

        Args:
            is_sampled: sample the next token, as set by `set_sampling`; False takes the token with
                the largest logit.
        """
        with self.history.writing([self._next]):
            self._next = UNKNOWN
            if self._graph is None:
                self.step.run()
            else:
                self._graph.replay()
        if self._sampling_graph is not None and is_sampled:
            self._sampling_graph.replay()
        elif is_sampled:
            self._sample()

    def _sample(self) -> None:
        """Replace the token in `step.word` with one sampled from `step.logits`."""
        assert self._sampler is not None
        token = self._sampler.pick(self.step.logits, self.step.position)
        self.step.word.copy_(replace_token(self.step.word, token))

    def learn(self, token: int) -> None:
        """Note the token that the host has read from `step.word`, for later prompts to reuse."""
        if not self.history.learn(token):  # no step has taken it yet
            self._next = token


@torch.no_grad()
def generate(
    model: GptOssForCausalLM | SharedModel,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
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
        top_p: probability mass to sample from, after `top_k`.
        top_k: number of most likely tokens to sample from, and those equal to the last; 0 for all.
        seed: seed for sampling.
        stop: tokens that end the generation; the stopping token is yielded.
        decoder: decoder with enough room to reuse, which also saves reading what this prompt has in
            common with earlier ones; None creates one.

    Raises:
        ValueError: An argument is out of range, `KernelStep` does not support the model, or the
            decoder has started another prompt since.
        StageError: A logit is NaN or infinite; the message names the token.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens}; allowed: at least 1")
    sampling = Sampling(temperature, top_k, top_p, seed)
    needed = input_ids.shape[-1] + max_new_tokens
    if decoder is None:
        is_whole = isinstance(model, GptOssForCausalLM)
        decoder = Decoder(model, needed) if is_whole else model.open_decoder(needed)
    if decoder.most_tokens < needed:
        raise ValueError(f"decoder: room for {decoder.most_tokens} tokens; required: {needed}")
    for token in _follow(decoder, input_ids, max_new_tokens, sampling):
        yield token
        if token in stop:
            return


def _follow(
    decoder: Decoder, input_ids: torch.Tensor, count: int, sampling: Sampling
) -> Iterator[int]:
    """Yield the tokens after a prompt; the host reads each while the next step runs."""
    logits = decoder.start(input_ids)
    prompt = decoder.prompts
    if not bool(logits.isfinite().all()):
        raise _not_finite(decoder, 0)
    is_sampled = sampling.temperature > 0
    if is_sampled:
        decoder.set_sampling(sampling.draw(count))
    token = decoder.pick(logits) if is_sampled else int(logits.argmax())
    decoder.put(token)
    pinned = torch.zeros(2, dtype=torch.int64, pin_memory=decoder.is_cuda)
    events = [torch.cuda.Event() for _ in range(2)] if decoder.is_cuda else []

    def launch(n: int) -> None:
        decoder.advance(is_sampled)
        pinned[n % 2 : n % 2 + 1].copy_(decoder.step.word, non_blocking=True)
        if events:
            events[n % 2].record()

    for n in range(count):
        if n == 0 and count > 1:
            launch(0)
        yield token
        if n + 1 == count:
            return
        if decoder.prompts != prompt:
            raise ValueError(
                "decoder: it has started another prompt since this one; allowed: one at a time"
            )
        if n + 2 < count:
            launch(n + 1)
        if events:
            events[n % 2].synchronize()
        word = int(pinned[n % 2])
        if not holds_finite(word):
            raise _not_finite(decoder, n + 1)
        token = decode_token(word)
        decoder.learn(token)


def _check_current(index: int, current: int) -> None:
    if index != current:  # launches, events and the graph would go to the other GPU
        raise ValueError(
            f"model: on cuda:{index}, the current device is cuda:{current}; allowed: the same. "
            f"Call this under `with torch.cuda.device({index})`"
        )


def _not_finite(decoder: Decoder, token: int) -> StageError:
    """Return the error to raise; no later prompt continues from these keys."""
    decoder.forget()
    return StageError(
        f"generated token {token} has logits that are not finite",
        "finite logits",
        "NaN or infinity",
        "the checkpoint is damaged, or its activations exceed bfloat16's range: evaluate it",
    )
