"""The endpoint, asked in process with a scripted model; tests/web asks it over the network."""

import asyncio
import datetime
import json
import threading
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import torch

from sparselong.chat.engine import Engine, PromptTooLong
from sparselong.chat.server import app as server_app
from sparselong.chat.server import make_app
from sparselong.chat.settings import Settings
from sparselong.chat.sources import Source
from sparselong.data import Delta
from sparselong.errors import StageError
from sparselong.generation.decoder import Decoder
from sparselong.kernels.decode.token_word import encode_token
from tests.chat.engines import CALL, ScriptedEngine

DAY = datetime.date(2026, 1, 31)
ASK = {"model": "run/finetuned", "messages": [{"role": "user", "content": "Hi"}]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@asynccontextmanager
async def client_of(engine, *, most_waiting=4, token=None, hosts=None, log=print, **headers):
    options = {"token": token, "hosts": hosts, "log": log}
    app = make_app(engine, Settings(), most_waiting=most_waiting, **options)
    transport, address = httpx.ASGITransport(app), "http://127.0.0.1:8000"
    try:
        async with httpx.AsyncClient(transport=transport, base_url=address, headers=headers) as one:
            yield one
    finally:
        app.state.turns.close()


def ask(engine=None, path="/v1/chat/completions", body=None, **options):
    """Return the response to one request; GET without a body."""

    async def run():
        async with client_of(engine or ScriptedEngine(), **options) as client:
            return await (client.get(path) if body is None else client.post(path, json=body))

    return asyncio.run(run())


def error_of(response):
    return response.json()["error"]


def events_of(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_a_whole_answer_has_text_thinking_and_figures():
    engine = ScriptedEngine()
    body = {**ASK, "temperature": 0, "max_tokens": 9, "seed": 5, "reasoning_effort": "high"}
    response = ask(engine, body=body).json()
    assert response["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "Hello there!",
                "reasoning_content": "Let me think.",
            },
            "finish_reason": "stop",
        }
    ]
    usage = response["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (7, 3, 10)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
    assert engine.asked == [(ASK["messages"], Settings(9, 0, 1, 0, 5, "high"), None)]
    assert engine.seen == ["torch"]  # settings are a thread's own


def test_a_stream_has_the_same_text_and_ends_with_the_usage():
    body = {**ASK, "stream": True, "stream_options": {"include_usage": True}}
    response = ask(body=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end, usage = events_of(response)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello there!"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Let me think."
    assert end["choices"][0]["finish_reason"] == "stop" and usage["usage"]["completion_tokens"] == 3
    assert len({event["id"] for event in events}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_passed_on_and_calls_returned(stream):
    engine = ScriptedEngine(CALL)
    response = ask(engine, body={**ASK, "tools": TOOLS, "stream": stream})
    if stream:
        choices = [event["choices"][0] for event in events_of(response)]
        (call,) = next(c["delta"]["tool_calls"] for c in choices if "tool_calls" in c["delta"])
        reason = choices[-1]["finish_reason"]
    else:
        (choice,) = response.json()["choices"]
        (call,), reason = choice["message"]["tool_calls"], choice["finish_reason"]
        assert choice["message"]["content"] is None
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Bonn"}'}
    assert call["id"].startswith("call_") and reason == "tool_calls"
    assert engine.asked[0][2][0]["function"]["name"] == "weather"


def test_earlier_turns_keep_thinking_calls_and_results():
    engine = ScriptedEngine()
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c", "name": "Ann"},  # which the prompt's rendering refuses
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    assert ask(engine, body={**ASK, "messages": messages}).status_code == 200
    assert engine.asked[0][0] == [
        {"role": "user", "content": "ab"},
        {"role": "user", "content": "c", "name": "Ann"},
        {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"), [("o the", "Hell"), (["!", "lo"], "Hel"), ("zzz", "Hello there!")]
)
def test_stop_texts_end_the_answer_and_are_left_out(stream, stop, text):
    response = ask(body={**ASK, "stop": stop, "stream": stream})
    if stream:
        deltas = [event["choices"][0]["delta"] for event in events_of(response)]
        found = "".join(delta.get("content", "") for delta in deltas)
    else:
        found = response.json()["choices"][0]["message"]["content"]
    assert found == text


@pytest.mark.parametrize("stream", [False, True])
def test_messages_of_one_channel_are_kept_apart(stream):
    """As they are in a terminal and in a kept conversation."""
    deltas = [
        Delta("analysis", "One.", None, 0),
        Delta("commentary", "Let me ", None, 1),
        Delta("commentary", "see.", None, 1),
        Delta("analysis", "Two.", None, 2),
        Delta("final", "It is 3.", None, 3),
        Delta("final", "Or 4.", None, 4),
    ]
    response = ask(ScriptedEngine(deltas), body={**ASK, "stream": stream, "stop": "4"})
    if stream:
        found = [event["choices"][0]["delta"] for event in events_of(response)]
        assert {} not in found[:-1]
    else:
        found = [response.json()["choices"][0]["message"]]
    assert "".join(each.get("content", "") for each in found) == "Let me see.\n\nIt is 3.\n\nOr "
    assert "".join(each.get("reasoning_content", "") for each in found) == "One.\n\nTwo."


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_in_the_analysis_channel_is_no_thinking(stream):
    engine = ScriptedEngine(
        [Delta("analysis", "Hm.", None, 0), Delta("analysis", "1", "python", 1)]
    )
    response = ask(engine, body={**ASK, "stream": stream})
    if stream:
        found = [event["choices"][0]["delta"] for event in events_of(response)]
    else:
        found = [response.json()["choices"][0]["message"]]
    assert "".join(each.get("reasoning_content", "") for each in found) == "Hm."
    (call,) = next(each["tool_calls"] for each in found if "tool_calls" in each)
    assert call["function"] == {"name": "python", "arguments": "1"}


@pytest.mark.parametrize("body", [b"[" * 100_000, b"9" * 5000, b"\xff"])
def test_bodies_that_are_no_json_are_refused_in_openai_s_form(body):
    async def run():
        async with client_of(ScriptedEngine()) as client:
            headers = {"Content-Type": "application/json"}
            return await client.post("/v1/chat/completions", content=body, headers=headers)

    response = asyncio.run(run())
    assert response.status_code == 400 and error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changed", "status", "named"),
    [
        ({"model": "gpt-4"}, 404, "gpt-4"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "boss", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": "0.5"}, 400, "temperature"),
        ({"temperature": True}, 400, "temperature"),
        ({"max_tokens": True}, 400, "max_tokens"),
        ({"seed": 1.5}, 400, "seed"),
        ({"seed": 1 << 63}, 400, "seed"),
        ({"stream": "yes"}, 400, "stream"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"reasoning_effort": "extreme"}, 400, "reasoning_effort"),
        ({"n": 2}, 400, "n:"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"frequency_penalty": 1}, 400, "frequency_penalty"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"stop": ""}, 400, "stop"),
        ({"unknown": 1}, 400, "unknown"),
    ],
)
def test_what_is_wrong_or_not_supported_is_refused_by_name(changed, status, named):
    engine = ScriptedEngine()
    response = ask(engine, body={**ASK, **changed})
    assert response.status_code == status and named in error_of(response)["message"]
    assert not engine.asked


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PromptTooLong(2000, 1000), "context_length_exceeded"),
        (StageError("the template refuses it", "x", "y", "z"), "invalid_messages"),
    ],
)
def test_conversations_that_the_model_cannot_take_are_400_and_the_next_is_answered(
    stream, error, code
):
    engine = ScriptedEngine()
    engine.refusal = error

    async def run():
        async with client_of(engine) as client:
            refused = await client.post("/v1/chat/completions", json={**ASK, "stream": stream})
            engine.refusal = None
            return refused, await client.post("/v1/chat/completions", json=ASK)

    refused, answered = asyncio.run(run())
    assert refused.status_code == 400 and error_of(refused)["code"] == code
    assert answered.status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "code", "told"),
    [
        (StageError("logits not finite", "x", "y", "z"), 500, "generation_failed", "not finite"),
        (torch.OutOfMemoryError("CUDA out of memory"), 503, "out_of_memory", "--context"),
        (RuntimeError("a secret"), 500, "generation_failed", "see the server's log"),
    ],
)
def test_a_failure_of_an_answer_is_the_server_s(error, status, code, told):
    engine, logged = ScriptedEngine(), []
    engine.failure = error
    response = ask(engine, body=ASK, log=logged.append)
    assert response.status_code == status
    found = error_of(response)
    assert (found["code"], found["type"]) == (code, "server_error") and told in found["message"]
    assert "secret" not in found["message"]
    assert str(error) in logged[0] and ("Traceback" in logged[0]) == (type(error) is RuntimeError)
    *_, last = (
        line for line in ask(engine, body={**ASK, "stream": True}).text.split("\n\n") if line
    )
    assert json.loads(last.removeprefix("data: ")) == {"error": found}
    engine.deltas = []  # it fails before anything was sent
    assert ask(engine, body={**ASK, "stream": True}).status_code == status


def test_a_server_answers_after_nan_and_after_a_lack_of_memory(untrained_base, monkeypatch):
    engine: Any = Engine(Source(untrained_base), "run/finetuned", 256, DAY)
    body = {**ASK, "temperature": 0, "max_tokens": 8}
    wanted = ask(engine, body=body).json()["choices"]
    long = {**body, "messages": [{"role": "user", "content": "And another one?"}]}
    advance = Decoder.advance

    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def overflow(self: Decoder, is_sampled: bool = False) -> None:
        advance(self, is_sampled)
        self.step.word.fill_(encode_token(5, is_finite=False))

    for name, broken, status in (
        ("_read", run_out, 503),
        ("advance", run_out, 503),
        ("advance", overflow, 500),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(Decoder, name, broken)
            response = ask(engine, body=long)
        assert response.status_code == status and error_of(response)["type"] == "server_error"
        assert ask(engine, body=body).json()["choices"] == wanted


def test_requests_wait_in_a_bounded_line():
    """One is answered, two wait, the others get 429; all that wait are answered."""
    step = threading.Event()
    engine = ScriptedEngine(step=step)

    async def run():
        async with client_of(engine, most_waiting=2) as client:
            many = [
                asyncio.create_task(client.post("/v1/chat/completions", json=ASK)) for _ in range(8)
            ]
            while sum(task.done() for task in many) < 5:
                await asyncio.sleep(0.01)
            health = (await client.get("/health")).json()
            step.set()
            return await asyncio.gather(*many), health, (await client.get("/metrics")).text

    responses, health, metrics = asyncio.run(run())
    codes = [response.status_code for response in responses]
    assert codes.count(200) == 3 and codes.count(429) == 5
    assert health == {"status": "ok", "running": 1, "waiting": 2}
    refused = next(response for response in responses if response.status_code == 429)
    assert int(refused.headers["retry-after"]) > 0
    assert error_of(refused)["type"] == "rate_limit_error"
    assert 'sparselong_requests_total{code="429"} 5' in metrics
    assert "sparselong_generated_tokens_total 9" in metrics


def test_a_client_that_reads_nothing_is_given_up(monkeypatch):
    """Otherwise all others would wait for it."""
    monkeypatch.setattr(server_app, "SEND_SECONDS", 0.2)
    engine = ScriptedEngine()

    async def run():
        app = make_app(engine, Settings(), most_waiting=4)
        body = [{"type": "http.request", "body": json.dumps({**ASK, "stream": True}).encode()}]
        path = "/v1/chat/completions"
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode()}
        scope |= {"query_string": b"", "headers": headers, "asgi": {"spec_version": "2.3"}}

        async def receive() -> Any:
            return body.pop() if body else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if message.get("body"):
                await asyncio.Event().wait()

        await asyncio.wait_for(app(scope, receive, send), 10)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000"
        ) as client:
            response = await client.post(path, json=ASK, timeout=10)
        app.state.turns.close()
        return response

    assert asyncio.run(run()).json()["choices"][0]["message"]["content"] == "Hello there!"


def test_models_and_unknown_paths():
    (model,) = ask(path="/v1/models").json()["data"]
    assert model["id"] == "run/finetuned" and model["context_length"] == 1000
    assert ask(path="/v1/models/run/finetuned").json() == model
    assert ask(path="/v1/models/x").status_code == 404
    unknown = ask(path="/v1/x")
    assert unknown.status_code == 404 and error_of(unknown)["message"] == "Not Found"
    assert error_of(ask(path="/v1/chat/completions"))["message"] == "Method Not Allowed"


def test_a_token_is_asked_for():
    assert ask(body=ASK, token="secret").status_code == 401
    assert ask(body=ASK, token="secret", Authorization="Bearer secre").status_code == 401
    assert ask(body=ASK, token="secret", Authorization="Bearer secret").status_code == 200
    assert ask(path="/metrics", token="secret").status_code == 401
    assert ask(path="/health", token="secret").status_code == 200


def test_other_names_of_this_machine_are_refused():
    """A page of another site could point a name of its own at this machine."""
    hosts = frozenset({"127.0.0.1"})
    assert ask(body=ASK, hosts=hosts, Host="evil.example").status_code == 403
    assert ask(body=ASK, hosts=hosts).status_code == 200


def test_large_bodies_are_refused():
    long = {**ASK, "messages": [{"role": "user", "content": "x" * (9 << 20)}]}
    assert ask(body=long).status_code == 413

    async def chunks():
        for _ in range(10):
            yield b" " * (1 << 20)

    async def run():
        async with client_of(ScriptedEngine()) as client:
            return await client.post("/v1/chat/completions", content=chunks())

    assert asyncio.run(run()).status_code == 413
