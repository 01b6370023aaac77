"""One model that answers one conversation at a time."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssForCausalLM

from sparselong.chat.answer import Answer, Usage
from sparselong.chat.conversation import Message
from sparselong.chat.settings import Settings
from sparselong.chat.sources import Source
from sparselong.data import Delta, Parser, read_marks, render_prompt
from sparselong.errors import StageError
from sparselong.generation import Decoder, SharedModel, generate
from sparselong.model import load_model, load_tokenizer

_WEIGHTS = "adapter_model.safetensors"


def never() -> bool:
    """Return False: nobody cancels."""
    return False


class Reply:
    """An answer in progress: iterate for its text, then read `answer`.

    Args:
        engine: what answers.
        prompt: token ids.
        settings: with a seed.
        stop: tokens that end it.
        is_cancelled: asked before each token.
        begun: `time.monotonic()` when the answer was asked for.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        settings: Settings,
        stop: tuple[int, ...],
        is_cancelled: Callable[[], bool],
        begun: float,
    ):
        self._engine, self._prompt, self._settings = engine, prompt, settings
        self._stop = stop
        self._is_cancelled, self._begun = is_cancelled, begun
        self._parser = Parser(engine.tokenizer, engine.marks)
        self._times: list[float] = []
        self._cancelled = False
        self._last: int | None = None

    def __iter__(self) -> Iterator[Delta]:
        """Generate, and yield pieces of text as they are complete."""
        engine, settings = self._engine, self._settings
        tokens = generate(
            engine.model,
            torch.tensor([self._prompt]),
            settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            seed=settings.seed or 0,
            stop=self._stop,
            decoder=engine.decoder,
        )
        for token in tokens:
            self._times.append(time.monotonic())
            self._last = token
            if token != engine.padding:  # some models end with it; it is no text
                yield from self._parser.feed(token)
            if self._is_cancelled():
                self._cancelled = True
                break
        yield from self._parser.close()

    @property
    def answer(self) -> Answer:
        """What was generated so far."""
        parts = [part for part in self._parser.messages if part.text or part.recipient]
        last = self._times[-1] if self._times else self._begun
        first = self._times[0] if self._times else last
        usage = Usage(
            len(self._prompt),
            self._engine.decoder.reused,
            len(self._times),
            first - self._begun,
            last - self._begun,
        )
        seed = self._settings.seed or 0
        return Answer(parts, self._reason(), usage, seed, dict(self._parser.repairs))

    def _reason(self) -> str:
        if self._last == self._engine.marks.call in self._stop:
            return "tool_calls"
        if self._last in self._stop:
            return "stop"
        return "cancelled" if self._cancelled else "length"


class Engine:
    """A model, its tokenizer and a cache for one conversation.

    Args:
        source: the checkpoint, and perhaps an adapter that is merged into it.
        name: what the model is called.
        most_tokens: tokens of prompt and answer together that the cache holds.
        today: the date that the chat template writes.
        attn_implementation: as of `load_model`.
        settled: settings of its passes (`runtime.using`), inside of which it is made. A thread that
            asks it for answers applies them, because settings are a thread's own.
        shared: the model of which this process holds a part; None: it opens the whole.

    Attributes:
        created: when it was opened, seconds since 1970.
        load_seconds: time that opening the model and making the cache took.

    Raises:
        StageError: the checkpoint or its tokenizer cannot be used, or the cache does not fit.
    """

    def __init__(
        self,
        source: Source,
        name: str,
        most_tokens: int,
        today: datetime.date,
        attn_implementation: str = "eager",
        settled: Mapping[str, Any] | None = None,
        shared: SharedModel | None = None,
    ):
        begin = time.monotonic()
        self.settled = settled or {}
        self.today = today
        self.name, self.most_tokens, self.created = name, most_tokens, int(time.time())
        self.tokenizer: Any = load_tokenizer(source.directory)
        self.marks = read_marks(self.tokenizer)
        self.padding: int = self.tokenizer.pad_token_id
        self.stop = (self.marks.return_, self.marks.call, self.padding)
        self._shared = shared
        self.model = open_model(source, attn_implementation) if shared is None else shared.model
        make = partial(Decoder, self.model) if shared is None else shared.open_decoder
        try:
            self.decoder = make(most_tokens)
        except torch.OutOfMemoryError as error:
            raise StageError(
                f"the GPU has no room for a cache of {most_tokens:,} tokens beside {name}",
                "memory for the model and the cache",
                str(error).split("\n")[0],
                "pass a smaller --context",
            ) from error
        self._warm_up()
        self.load_seconds = time.monotonic() - begin

    @property
    def broken(self) -> BaseException | None:
        """Why it cannot answer any more: what ended the processes that share the model."""
        return None if self._shared is None else self._shared.failure

    def _warm_up(self) -> None:
        """Compile kernels and capture the sampled step, while nothing else uses the GPU."""
        word = torch.tensor([[self.marks.start]])
        tokens = generate(self.model, word, 2, temperature=1.0, decoder=self.decoder)
        for _ in tokens:
            pass
        self.decoder.forget()

    def reply(
        self,
        messages: list[Message],
        settings: Settings,
        *,
        tools: list[dict[str, Any]] | None = None,
        is_cancelled: Callable[[], bool] = never,
        stop: tuple[int, ...] | None = None,
    ) -> Reply:
        """Return the answer to a conversation, which is generated as it is iterated.

        Args:
            messages: the conversation, which a message of the user or of a tool ends.
            settings: how it is generated; what the cache has no room for is not generated.
            tools: functions that the model may call, in OpenAI's form.
            is_cancelled: asked before each token whether to stop.
            stop: tokens that end the answer; None: those of the format.

        Raises:
            StageError: the template refuses the messages, or they leave no room for an answer.
        """
        begun = time.monotonic()
        prompt = render_prompt(
            self.tokenizer,
            [_as_rendered(message) for message in messages],
            today=self.today,
            reasoning_effort=settings.reasoning,
            tools=tools,
        )
        room = self.most_tokens - len(prompt)
        if room < 1:
            raise PromptTooLong(len(prompt), self.most_tokens)
        bounded = settings.seeded().changed({"max_new_tokens": min(settings.max_new_tokens, room)})
        ends = self.stop if stop is None else stop
        return Reply(self, prompt, bounded, ends, is_cancelled, begun)


def open_model(
    source: Source, attn_implementation: str, device: torch.device | None = None
) -> GptOssForCausalLM:
    """Return a checkpoint's model, or inside of `using(experts=...)` this process's part of it.

    Raises:
        StageError: it, or the adapter that is merged into it, cannot be opened.
    """
    model = load_model(source.directory, device=device, attn_implementation=attn_implementation)
    return model if source.adapter is None else _merge(model, source.adapter)


def _merge(model: Any, adapter: Path) -> Any:
    """Return the model with an adapter of attention merged into its weights."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(adapter / _WEIGHTS, "pt") as file:  # PEFT would also unpickle other files
            found = set(file.keys())
        opened: Any = PeftModel.from_pretrained(model, adapter)
        wanted = set(get_peft_model_state_dict(opened, save_embedding_layers=False))
        # PEFT only warns of tensors that are missing, and of others says nothing.
        if found != wanted:
            missing, others = sorted(wanted - found), sorted(found - wanted)
            raise ValueError(
                f"{_WEIGHTS} lacks {len(missing)} of {len(wanted)} tensors {missing[:1]}, and has "
                f"{len(others)} unknown ones {others[:1]}"
            )
        return opened.merge_and_unload()
    except torch.OutOfMemoryError:  # told elsewhere
        raise
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, SafetensorError) as error:
        raise StageError(
            f"the adapter {adapter} cannot be merged into its base",
            f"LoRA on attention's bf16 projections, of the base's shapes, in {_WEIGHTS}",
            " ".join(str(error).split())[:400],
            "use the base that the adapter was trained on, or save the adapter again",
        ) from error


def _as_rendered(message: Message) -> Message:
    """Return a message as the template can write it.

    Before a tool call it writes one text, as thinking: what was thought and what was said.
    """
    if not message.get("tool_calls") or not message.get("thinking") or not message.get("content"):
        return message
    return {**message, "thinking": f"{message['thinking']}\n\n{message['content']}", "content": ""}


class PromptTooLong(StageError):
    """A conversation has more tokens than the cache."""

    def __init__(self, tokens: int, most_tokens: int):
        super().__init__(
            "the conversation is too long",
            f"at most {most_tokens - 1:,} tokens, so that an answer has room",
            f"{tokens:,} tokens; nothing was cut",
            "begin a new conversation (/clear), shorten the message, or pass a larger --context",
        )
