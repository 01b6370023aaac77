"""The endpoint with the official `openai` client, and with many clients at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from openai import OpenAI

from sparselong.chat.engine import PromptTooLong
from sparselong.data import Delta
from tests.chat.engines import CALL, HELLO, ScriptedEngine

ASK = {"model": "run/finetuned", "messages": [{"role": "user", "content": "Hi"}]}
LONG = [Delta("final", f"{n} ", None) for n in range(500)]


def connect(served, key="none") -> OpenAI:
    return OpenAI(base_url=f"{served.address}/v1", api_key=key, max_retries=0, timeout=30)


def test_whole_and_streamed_answers_are_the_same(server):
    client = connect(server.start(ScriptedEngine(HELLO)))
    whole = client.chat.completions.create(**ASK, temperature=0, seed=1, max_tokens=20)
    (choice,) = whole.choices
    assert choice.message.content == "Hello there!" and choice.finish_reason == "stop"
    assert whole.usage is not None and whole.usage.completion_tokens == 3
    chunks = list(
        client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    assert chunks[-1].usage == whole.usage.model_copy(update={"seconds": chunks[-1].usage.seconds})
    thinking = "".join(getattr(delta, "reasoning_content", "") for delta in deltas)
    assert thinking == choice.message.reasoning_content == "Let me think."


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_answered(server, stream):
    engine = ScriptedEngine(CALL)
    client = connect(server.start(engine))
    function = {"name": "weather", "description": "Weather.", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": function}]
    if stream:
        chunks = list(client.chat.completions.create(**ASK, tools=tools, stream=True))
        (call,) = next(
            c.choices[0].delta.tool_calls for c in chunks if c.choices[0].delta.tool_calls
        )
        calls = [{"id": call.id, "type": "function", "function": call.function.model_dump()}]
    else:
        message = client.chat.completions.create(**ASK, tools=tools).choices[0].message
        (call,) = message.tool_calls
        calls = [call.model_dump()]
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Bonn"}')
    engine.deltas = HELLO
    followed = [
        *ASK["messages"],
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    answer = client.chat.completions.create(model=ASK["model"], messages=followed, tools=tools)
    assert answer.choices[0].message.content == "Hello there!"
    assert engine.asked[-1][0][-1] == {"role": "tool", "tool_call_id": call.id, "content": "sunny"}


def test_refusals_are_the_client_s_own_exceptions(server):
    engine = ScriptedEngine(HELLO)
    client = connect(server.start(engine, token="right"), "wrong")
    with pytest.raises(openai.AuthenticationError):
        client.models.list()
    client = connect(server.start(engine))
    assert [model.id for model in client.models.list()] == ["run/finetuned"]
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**{**ASK, "model": "gpt-4"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**ASK, n=2)
    engine.refusal = PromptTooLong(5000, 1000)
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as long:
            list(client.chat.completions.create(**ASK, stream=stream))
        assert long.value.code == "context_length_exceeded"


def test_fifty_clients_get_an_answer_or_429(server):
    engine = ScriptedEngine(HELLO)
    engine.delay = 0.02
    served = server.start(engine, most_waiting=10)

    def ask(number: int) -> str:
        try:
            with connect(served) as client:
                if number % 2:
                    chunks = client.chat.completions.create(**ASK, stream=True)
                    return "".join(c.choices[0].delta.content or "" for c in chunks)
                return client.chat.completions.create(**ASK).choices[0].message.content or ""
        except openai.RateLimitError as error:
            assert int(error.response.headers["retry-after"]) > 0
            return "429"

    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(ask, range(50)))
    assert set(found) == {"Hello there!", "429"}
    assert 11 <= found.count("Hello there!") < 50
    assert httpx.get(f"{served.address}/health").json()["waiting"] == 0
    assert ask(0) == "Hello there!"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_when_its_client_goes_away(server, stream):
    engine = ScriptedEngine(LONG)
    engine.delay = 0.02
    served = server.start(engine)
    with httpx.Client() as client, pytest.raises(httpx.ReadTimeout):
        body = {**ASK, "stream": stream}
        with client.stream(
            "POST", f"{served.address}/v1/chat/completions", json=body, timeout=0.4
        ) as response:
            for _ in response.iter_lines():
                raise httpx.ReadTimeout("gone")
    deadline = time.monotonic() + 5
    while not engine.replies[0].cancelled:
        assert time.monotonic() < deadline, "the model generates for nobody"
        time.sleep(0.02)
    engine.deltas = HELLO
    with connect(served) as client:
        assert client.chat.completions.create(**ASK).choices[0].message.content == "Hello there!"


def test_clients_that_go_away_while_they_wait_block_nobody(server):
    engine = ScriptedEngine(HELLO, step=threading.Event())
    served = server.start(engine, most_waiting=3)
    address = f"{served.address}/v1/chat/completions"

    def leave(stream: bool) -> None:
        with pytest.raises(httpx.TimeoutException):
            httpx.post(address, json={**ASK, "stream": stream}, timeout=0.3)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(leave, (True, False, True, False)))
    assert engine.step is not None
    engine.step.set()
    with connect(served) as client:
        assert client.chat.completions.create(**ASK).choices[0].message.content == "Hello there!"
    assert httpx.get(f"{served.address}/health").json() == {
        "status": "ok", "running": 0, "waiting": 0,
    }  # fmt: skip
