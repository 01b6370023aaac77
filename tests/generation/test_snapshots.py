"""A prompt that continues what the cache holds gives the same as one that is read whole."""

import itertools
import random

import pytest
import torch

from sparselong.generation import decoder as generation
from sparselong.generation.decoder import Decoder, generate
from sparselong.generation.snapshots import MOST_SNAPSHOTS, UNKNOWN, History
from tests.generation.small import as_prompt, draw_tokens, make_small, state_of
from tests.generation.test_decoder import WINDOW

ROOM, CHUNK = 160, 13


@pytest.fixture(scope="module")
def model():
    return make_small()


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(generation, "PROMPT_TOKENS", CHUNK)


def answer(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    return list(generate(decoder.model, as_prompt(prompt), count, decoder=decoder))


def check_state(decoder: Decoder, fresh: Decoder) -> None:
    """Compare all that later tokens may attend to; a wrong key differs by 0.1 and more."""
    for ours, theirs in zip(state_of(decoder), state_of(fresh), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def interrupt(decoder: Decoder, prompt: list[int], chunk: int) -> None:
    """Read a prompt and fail in one of its chunks, half-way through the layers."""
    calls = itertools.count()

    def fail(*_: object) -> None:
        if next(calls) == chunk:
            raise InterruptedError

    with decoder.model.model.layers[2].register_forward_hook(fail):
        try:
            decoder.start(as_prompt(prompt))
        except InterruptedError:
            return


def branch(source: random.Random, spoken: list[list[int]]) -> list[int]:
    """Return a prompt that shares a part of an earlier conversation, mostly of the last one."""
    earlier = source.choice([*spoken[-4:], *spoken[-1:] * 6])
    most = min(len(earlier), ROOM - 60)
    shared = source.choice([most, most - 1, source.randint(most // 2, most), most // 3])
    tail = draw_tokens(source.choice([1, 2, 5, 9, 30]), source.randrange(10**9))
    return earlier[: max(shared, 0)] + tail


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_prompts_gives_a_fresh_decoder_s_tokens(model, seed):
    source, decoder = random.Random(seed), Decoder(model, ROOM)
    spoken, reused = [[]], []
    for _ in range(14):
        prompt = branch(source, spoken)
        if source.random() < 0.2:
            interrupt(decoder, branch(source, spoken), source.randrange(3))
        fresh = Decoder(model, ROOM)
        logits = fresh.start(as_prompt(prompt))
        torch.testing.assert_close(decoder.start(as_prompt(prompt)), logits, rtol=1e-3, atol=1e-3)
        reused.append(decoder.reused)
        assert decoder.reused < len(prompt) and fresh.reused == 0
        check_state(decoder, fresh)
        ends = [snapshot.end for snapshot in decoder.history.snapshots]
        assert ends == sorted(set(ends)) and ends[-1] == len(prompt)
        count, temperature = source.randint(1, 12), source.choice([0.0, 3.0])
        settings = {"temperature": temperature, "seed": source.randrange(99)}
        wanted = list(generate(model, as_prompt(prompt), count, decoder=fresh, **settings))
        tokens = generate(model, as_prompt(prompt), count, decoder=decoder, **settings)
        heard = list(itertools.islice(tokens, source.randint(1, count)))
        tokens.close()
        assert heard == wanted[: len(heard)]
        spoken.append(prompt + heard)
    assert len(set(reused)) > 3 and max(reused) > 2 * WINDOW, reused


def test_a_continued_prompt_is_bit_identical_to_the_same_chunks(model, monkeypatch):
    """A turn after an answer, and one decoder that reads both prompts' chunks without it."""
    first, tail = draw_tokens(3 * WINDOW + 2, 1), draw_tokens(2 * WINDOW, 2)
    decoder = Decoder(model, ROOM)
    monkeypatch.setattr(generation, "PROMPT_TOKENS", len(first))
    answer(decoder, first, 2 * WINDOW)
    logits = decoder.start(as_prompt(first + tail))
    assert decoder.reused == len(first)
    fresh = Decoder(model, ROOM)
    assert torch.equal(logits, fresh.start(as_prompt(first + tail)))
    assert fresh.reused == 0
    for ours, theirs in zip(state_of(decoder), state_of(fresh), strict=True):
        assert torch.equal(ours, theirs)
    again = answer(decoder, first + tail, 9)
    assert again == answer(Decoder(model, ROOM), first + tail, 9)


def test_turns_of_a_chat_continue_from_where_they_differ(model):
    prompt = draw_tokens(30, 1)
    decoder = Decoder(model, ROOM)
    spoken = answer(decoder, prompt, 20)

    def begin(tokens: list[int]) -> int:
        decoder.start(as_prompt(tokens))
        return decoder.reused

    def speak() -> None:
        decoder.forget()
        assert answer(decoder, prompt, 20) == spoken

    assert begin(prompt + draw_tokens(9, 2)) == 30, "the analysis was dropped"
    assert begin(prompt) == 29, "a retry: the last token is read for its logits"
    speak()
    assert begin(prompt + spoken + [1]) == 49, "all was kept; the last token was never read"
    speak()
    assert begin(prompt + spoken[:18] + [1 + spoken[18] % 90, 3]) == 48, "another end token"
    speak()
    assert begin(prompt + spoken[:10] + [1 + spoken[10] % 90]) == 30
    speak()
    assert begin(prompt[:28] + [1 + prompt[28] % 90] * 9) == 2 * CHUNK, "an edited question"
    assert begin([1 + prompt[0] % 90, *prompt[1:]]) == 0
    assert begin(prompt) == 0, "the full layers hold other tokens by now"


def test_within_the_window_any_prefix_continues(model):
    prompt = draw_tokens(WINDOW - 3, 1)
    decoder = Decoder(model, ROOM)
    answer(decoder, prompt, 4)
    decoder.start(as_prompt([*prompt[:2], 1 + prompt[2] % 90, 5]))
    assert decoder.reused == 2


def test_an_abandoned_answer_is_known_as_far_as_it_was_read(model):
    prompt, decoder = draw_tokens(20, 1), Decoder(model, ROOM)
    tokens = generate(model, as_prompt(prompt), 20, decoder=decoder)
    heard = list(itertools.islice(tokens, 7))
    tokens.close()
    assert decoder.history.tokens == prompt + heard
    decoder.advance()
    assert decoder.history.tokens == [*prompt, *heard, UNKNOWN]
    decoder.advance()
    decoder.start(as_prompt([*prompt, *heard, 5]))
    assert decoder.reused == 20, "what the host has not read is not continued"


def test_an_interrupted_prompt_continues_from_its_last_whole_chunk(model):
    prompt, decoder = draw_tokens(3 * CHUNK, 1), Decoder(model, ROOM)
    interrupt(decoder, prompt, 2)
    fresh = Decoder(model, ROOM)
    logits = fresh.start(as_prompt(prompt))
    assert torch.equal(decoder.start(as_prompt(prompt)), logits)
    assert decoder.reused == 2 * CHUNK
    check_state(decoder, fresh)


def test_a_forgotten_cache_is_read_again(model):
    prompt, decoder = draw_tokens(20, 1), Decoder(model, ROOM)
    logits = decoder.start(as_prompt(prompt))
    decoder.forget()
    assert torch.equal(decoder.start(as_prompt(prompt)), logits) and decoder.reused == 0
    decoder.put(5)
    decoder.forget()
    decoder.advance()
    decoder.start(as_prompt([5, *prompt]))
    assert decoder.reused == 0, "the token that was read is at another position"


def test_a_generation_ends_when_its_decoder_has_started_another_prompt(model):
    decoder = Decoder(model, ROOM)
    older = generate(model, as_prompt([5, 6]), 9, decoder=decoder)
    next(older)
    answer(decoder, [7, 8], 3)
    with pytest.raises(ValueError, match="another prompt since"):
        next(older)


def test_few_snapshots_are_kept_spread_over_a_long_prompt(model):
    decoder = Decoder(model, ROOM)
    prompt = draw_tokens(12 * CHUNK - 1, 1)
    decoder.start(as_prompt(prompt))
    ends = [snapshot.end for snapshot in decoder.history.snapshots]
    assert len(ends) == MOST_SNAPSHOTS and ends[-2:] == [11 * CHUNK, 12 * CHUNK - 1]
    assert max(after - before for before, after in itertools.pairwise([0, *ends])) <= 3 * CHUNK


def test_without_sliding_layers_every_prefix_continues(model):
    decoder = Decoder(model, ROOM)
    history = History([cache for cache in decoder.caches if not cache.is_window])
    with history.writing([4, 5, 6, 7] * 9):
        pass
    history.snapshot()
    assert history.snapshots == [] and history.resume([4, 5, 6, 7, 4, 9, 9]) == 5
