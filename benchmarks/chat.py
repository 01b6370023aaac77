#!/usr/bin/env python3
"""The chat endpoint in gpt-oss-20b's shape over HTTP, beside `generate` on the same prompt.

The model has random weights in the formats of stage 02's output, made on the GPU, and a tokenizer
of its vocabulary, so that nearly every token is text. The endpoint is 06_chat.py's own, on the
loopback address, in a thread of the process that also calls `generate`, with the same decoder; the
client is another process. No token ends an answer, and every prompt is read whole.

| backend    | what                                                                           |
|------------|--------------------------------------------------------------------------------|
| generate   | this project's `generate` in the process                                       |
| whole      | a request that is answered with one document                                   |
| stream     | a request that is answered by server-sent events                               |

`throughput` is the tokens after the first one by the seconds that they add: the time of `--tokens`
tokens minus that of one, each with everything that a request needs. `sampled_throughput` is the
same with the settings of SAMPLED, `first_token_seconds` the time of one token.

`turn_first_token_seconds` is the time of a request for one token that continues a prefix of
`--prefix` tokens, and `tail_first_token_seconds` that of a request whose whole prompt is as long as
what the turn must read. `null_launch_seconds` is what the launch of a kernel that does nothing
costs the host: where it is high, small differences are the machine's.

Arms take turns, and medians are compared. On a GPU, exit code 1 if a figure is below its limit in
LIMITS.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import GptOssForCausalLM

from benchmarks.base_checkpoint import enlarge_vocabulary, write_base, write_description
from benchmarks.command_line import add_result, command_of, machine_of
from benchmarks.generation import make_model
from benchmarks.record import row, write
from sparselong.data import render_prompt
from sparselong.generation import Decoder, generate
from sparselong.model import load_model

VOCABULARY = {"20b": 199_990, "tiny": 4000}
"""Tokens of the tokenizer by widths; a few rows of the embedding have none, as published."""
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 1}
GREEDY = {"temperature": 0.0}
LIMITS = {"whole": 0.95, "stream": 0.95, "whole sampled": 0.85, "stream sampled": 0.85}
"""Least throughput of the endpoint, of that of greedy `generate`."""
MOST_TURN = 1.3
"""Longest first token of a second turn, of that of a prompt of what it must read."""
DAY = datetime.date(2026, 1, 31)
LAUNCHES = 2000
Ask = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Built:
    """A model that was made in this process, in the place of one that several processes share."""

    model: GptOssForCausalLM
    failure: None = None

    def open_decoder(self, most_tokens: int) -> Decoder:
        """Return a decoder."""
        return Decoder(self.model, most_tokens)


def open_engine(args: argparse.Namespace, folder: Path) -> Any:
    """Return the chat's engine on a model with random weights."""
    from sparselong.chat.engine import Engine
    from sparselong.chat.sources import Source

    torch.manual_seed(0)
    if args.widths == "tiny":
        write_base(folder, args.widths, args.layers, "cpu", lambda _: None)
        model = load_model(folder)
    else:
        write_description(folder, args.widths, args.layers)
        model = make_model("graph", args.layers)
    enlarge_vocabulary(folder, VOCABULARY[args.widths])
    room = 2 * (args.prefix + args.prompt) + args.tokens
    shared: Any = Built(model)
    engine = Engine(Source(folder), "bench", room, DAY, shared=shared)
    engine.stop = ()
    return engine


@contextmanager
def serving(engine: Any) -> Iterator[str]:
    """Answer requests in a thread; yield the address."""
    import uvicorn

    from sparselong.chat.server import make_app
    from sparselong.chat.settings import Settings

    app = make_app(engine, Settings(), most_waiting=4)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            sys.exit("the endpoint did not start")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def asking(address: str) -> Iterator[Ask]:
    """Start a client; yield what sends a request and returns seconds, tokens and reused tokens."""
    command = [sys.executable, __file__, "--client", address]
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert client.stdin is not None and client.stdout is not None

    def ask(messages: list[dict[str, str]], count: int, **settings: Any) -> dict[str, Any]:
        body = {"model": "bench", "messages": messages, "max_tokens": count, **settings}
        print(json.dumps(body), file=client.stdin, flush=True)
        line = client.stdout.readline() if client.stdout else ""
        if not line:
            sys.exit("the client ended")
        found = json.loads(line)
        if found["tokens"] != count:
            sys.exit(f"{found['tokens']} tokens of {count}")
        return found

    try:
        yield ask
    finally:
        client.stdin.close()
        client.wait()


def run_client(address: str) -> None:
    """Send the requests that stdin names, one a line, and write what they took."""
    import httpx

    with httpx.Client(base_url=address, timeout=600) as client:
        for line in sys.stdin:
            body = json.loads(line)
            begin = time.perf_counter()
            usage = (_stream if body.get("stream") else _whole)(client, body)
            seconds = time.perf_counter() - begin
            found = {
                "seconds": seconds,
                "tokens": usage["completion_tokens"],
                "prompt": usage["prompt_tokens"],
                "reused": usage["prompt_tokens_details"]["cached_tokens"],
            }
            print(json.dumps(found), flush=True)


def _whole(client: Any, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    return response.json()["usage"]


def _stream(client: Any, body: dict[str, Any]) -> dict[str, Any]:
    """Read a whole stream, each event as it comes; return the usage at its end."""
    usage: dict[str, Any] = {}
    body = {**body, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                usage = json.loads(line[6:]).get("usage") or usage
    return usage


def compose(engine: Any, tokens: int, *earlier: dict[str, str]) -> list[dict[str, str]]:
    """Return messages whose prompt has at least `tokens` tokens, and few more."""
    words: list[str] = []
    while True:
        messages = [*earlier, {"role": "user", "content": " ".join(["Go on:", *words])}]
        missing = tokens - len(encode(engine, messages))
        if missing <= 0:
            return messages
        words += ["one"] * max(1, missing // 4)


def encode(engine: Any, messages: list[dict[str, str]]) -> list[int]:
    """Return the prompt of a conversation, as the endpoint renders it."""
    return render_prompt(engine.tokenizer, messages, today=DAY, reasoning_effort="medium")


def time_arms(args: argparse.Namespace, engine: Any, ask: Ask) -> dict[str, dict[str, float]]:
    """Return medians of seconds to one token and of tokens per second after it, by arm."""
    messages = compose(engine, args.prompt)
    prompt = torch.tensor([encode(engine, messages)])

    def call(count: int, **settings: Any) -> float:
        begin = time.perf_counter()
        tokens = generate(engine.model, prompt, count, decoder=engine.decoder, **settings)
        for _ in tokens:
            pass
        return time.perf_counter() - begin

    def request(count: int, **settings: Any) -> float:
        return ask(messages, count, **settings)["seconds"]

    arms: dict[str, tuple[Callable[..., float], dict[str, Any]]] = {}
    for name, settings in (("", GREEDY), (" sampled", SAMPLED)):
        arms[f"generate{name}"] = (call, settings)
        arms[f"whole{name}"] = (request, settings)
        arms[f"stream{name}"] = (request, {**settings, "stream": True})
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for repeat in range(args.repeats + 1):
        for name, (run, settings) in arms.items():
            times = []
            for count in (1, args.tokens):
                engine.decoder.forget()
                times.append(run(count, **settings))
            if repeat:  # the first round compiles
                found[name].append((times[0], (args.tokens - 1) / (times[1] - times[0])))
    return {
        name: {
            "first_token_seconds": statistics.median(first for first, _ in pairs),
            "throughput": statistics.median(rate for _, rate in pairs),
        }
        for name, pairs in found.items()
    }


def time_turns(args: argparse.Namespace, engine: Any, ask: Ask) -> dict[str, float]:
    """Return seconds of a second turn's first token, and of what it must read alone."""
    before = compose(engine, args.prefix)
    turn = [*before, {"role": "assistant", "content": "Yes."}]
    turn = compose(engine, len(encode(engine, before)) + args.prompt, *turn)
    turns, alone, read, tail = [], [], 0, None
    for repeat in range(args.repeats + 1):
        engine.decoder.forget()
        ask(before, 1, **GREEDY)
        found = ask(turn, 1, **GREEDY)
        read = found["prompt"] - found["reused"]
        if found["reused"] < args.prefix:
            sys.exit(f"the second turn reused {found['reused']} tokens of {args.prefix}")
        tail = tail or compose(engine, read)
        engine.decoder.forget()
        short = ask(tail, 1, **GREEDY)
        if repeat:
            turns.append(found["seconds"])
            alone.append(short["seconds"])
    return {
        "turn_first_token_seconds": statistics.median(turns),
        "tail_first_token_seconds": statistics.median(alone),
        "tokens_to_read": read,
    }


def time_null_launch() -> float:
    """Return the host's seconds for a launch of a kernel that does nothing."""
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(LAUNCHES):
        torch.cuda._sleep(1)
    seconds = time.perf_counter() - begin
    torch.cuda.synchronize()
    return seconds / LAUNCHES


def measure(args: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows, and what is beyond its limit."""
    begin = time.perf_counter()
    engine = open_engine(args, folder)
    loaded = time.perf_counter() - begin
    case = {name: getattr(args, name) for name in ("widths", "layers", "prompt", "tokens")}
    with serving(engine) as address, asking(address) as ask:
        arms = time_arms(args, engine, ask)
        turns = time_turns(args, engine, ask)
    rows = [row(case, "generate", "load_seconds", loaded, "s")]
    for name, figures in arms.items():
        backend, _, kind = name.partition(" ")
        if not kind:
            rows.append(row(case, backend, "first_token_seconds",
                            figures["first_token_seconds"], "s"))  # fmt: skip
        metric = "sampled_throughput" if kind else "throughput"
        rows.append(row(case, backend, metric, figures["throughput"], "tokens/s"))
    turn_case = {**case, "prefix": args.prefix}
    for metric, value in turns.items():
        rows.append(row(turn_case, "whole", metric, value, "1" if "tokens" in metric else "s"))
    if torch.cuda.is_available():
        rows.append(row(case, "generate", "null_launch_seconds", time_null_launch(), "s"))
    base = arms["generate"]["throughput"]
    beyond = [
        f"{name}: {arms[name]['throughput'] / base:.1%} of generate's tokens/s, not {least:.0%}"
        for name, least in LIMITS.items()
        if arms[name]["throughput"] < least * base
    ]
    ratio = turns["turn_first_token_seconds"] / turns["tail_first_token_seconds"]
    if ratio > MOST_TURN:
        beyond.append(f"a second turn's first token takes {ratio:.2f} times that of its tokens")
    return rows, beyond


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", default="20b", choices=VOCABULARY, help="tiny: on a CPU too")
    parser.add_argument("--layers", type=int, default=24, help="24 is the 20b")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt (at least)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--prefix", type=int, default=4096, help="tokens before the second turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--client", help=argparse.SUPPRESS)  # the process that sends requests
    add_result(parser)
    args = parser.parse_args()
    if args.client:
        run_client(args.client)
        return
    if args.widths != "tiny" and not torch.cuda.is_available():
        print("benchmarks/chat.py needs a CUDA device: nothing measured; pass --widths tiny")
        return
    machine = machine_of(args)
    with tempfile.TemporaryDirectory() as folder:
        rows, beyond = measure(args, Path(folder) / "base")
    for entry in rows:
        print(f"{entry['backend']:9} {entry['metric']:26} {entry['value']:14.6g}", file=sys.stderr)
    print(write("chat", machine, command_of(__file__, args), rows, args.folder))
    if beyond and args.widths != "tiny":
        sys.exit("\n".join(beyond))


if __name__ == "__main__":
    main()
