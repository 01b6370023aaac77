"""What 06_chat.py does: opens the model, then answers one question, a person, or requests."""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sparselong.chat import conversation as files
from sparselong.chat.command import check_options, host_of, is_own, read_question
from sparselong.chat.engine import Engine
from sparselong.chat.opening import use_model
from sparselong.chat.settings import Settings
from sparselong.chat.stream import Display, make_console
from sparselong.errors import ConfigError
from sparselong.run import Stage

BENCH_PROMPT = "Count from one to a hundred in words."
BENCH_TOKENS, BENCH_ROUNDS = 128, 3
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
Document = dict[str, Any]


def chat(stage: Stage, arguments: argparse.Namespace, token: str | None) -> Document:
    """Open the model and do what the command line asks for.

    Args:
        stage: the run.
        arguments: the parsed command line.
        token: bearer token that requests to the endpoint must have.

    Returns:
        What `--json` prints.
    """
    settings = check_options(arguments, token)
    prompt = arguments.prompt
    is_endpoint = arguments.serve or arguments.web
    # There is no stdin if the shell closed it (<&-).
    is_piped = sys.stdin is None or not sys.stdin.isatty()
    if prompt is None and not is_endpoint and not arguments.bench and is_piped:
        prompt = "-"
    question = None if prompt is None else read_question(prompt)
    if question is None and arguments.json and not (is_endpoint or arguments.bench):
        raise ConfigError(
            "--json has no document of a conversation in a terminal",
            "--prompt, --bench, --serve or --web beside it",
            "none of them",
            "pass --prompt, or leave --json away",
        )

    def use(engine: Engine) -> Document:
        if question is not None:
            result = ask(engine, settings, question, arguments)
        elif arguments.bench:
            result = measure(engine, settings)
        elif is_endpoint:
            result = answer_requests(stage, engine, settings, arguments, token, listening)
        else:
            result = converse(stage, engine, settings, arguments)
        head = {"stage": stage.name, "status": "done", "model": engine.name}
        return {**head, "load_seconds": engine.load_seconds, **result}

    with _bind(arguments) as listening:
        return use_model(stage, arguments, use)


def _bind(arguments: argparse.Namespace) -> AbstractContextManager[Any]:
    """Bind the endpoint's address, which may be taken, before the model is opened."""
    if not arguments.serve and not arguments.web:
        return nullcontext()
    from sparselong.chat.server import bind

    return bind(host_of(arguments), arguments.port)


def first_messages(arguments: argparse.Namespace) -> list[files.Message]:
    """Return the conversation that the command line begins: empty, or a system message."""
    return [{"role": "system", "content": arguments.system}] if arguments.system else []


def ask(
    engine: Engine, settings: Settings, question: str, arguments: argparse.Namespace
) -> Document:
    """Answer one question; the answer goes to stdout as it comes, or into the document."""
    messages = [*first_messages(arguments), {"role": "user", "content": question}]
    reply = engine.reply(messages, settings)
    if arguments.json:
        for _ in reply:
            pass
    else:
        Display(make_console(), arguments.show_thinking).show(reply)
    answer = reply.answer
    if answer.is_silent:
        print("the model ended without an answer; --show-thinking shows what it thought, if it did",
              file=sys.stderr, flush=True)  # fmt: skip
    for fault in answer.faults(settings.max_new_tokens, engine.most_tokens):
        print(fault, file=sys.stderr, flush=True)
    return {"settings": settings.document(), **answer.document()}


def converse(
    stage: Stage, engine: Engine, settings: Settings, arguments: argparse.Namespace
) -> Document:
    """Talk with a person in a terminal."""
    from sparselong.chat.terminal import Terminal

    terminal = Terminal(
        engine,
        settings,
        stage.dir,
        make_console(),
        show_thinking=arguments.show_thinking,
        system=arguments.system,
    )
    terminal.run()
    return {}


def answer_requests(
    stage: Stage,
    engine: Engine,
    settings: Settings,
    arguments: argparse.Namespace,
    token: str | None,
    listening: socket.socket,
) -> Document:
    """Serve the endpoint, with or without the page, until a signal."""
    from sparselong.chat.server import add_page, make_app, serve

    host = host_of(arguments)
    hosts = LOOPBACK | {listening.getsockname()[0]} if is_own(host) else None
    app = make_app(
        *(engine, settings),
        most_waiting=arguments.queue,
        token=token,
        hosts=hosts,
        log=stage.log,
    )
    if arguments.web:
        add_page(app, engine, settings, stage.dir / files.FOLDER)

    def tell(address: str) -> None:
        what = address if arguments.web else f"{address}/v1"
        stage.log(f"{engine.name} answers at {what}; Ctrl-C ends")
        if arguments.json:
            print(json.dumps({"address": address, "model": engine.name}), flush=True)

    serve(app, listening, tell, lambda: engine.broken is not None)
    return {"requests": dict(app.state.metrics.requests)}


def measure(engine: Engine, settings: Settings) -> Document:
    """Return the time to the first token and the rate after it, medians of a few answers.

    No token ends an answer, and each prompt is read whole.
    """
    bounded = settings.changed({"max_new_tokens": BENCH_TOKENS, "seed": settings.seed or 0})
    usages = []
    messages = [{"role": "user", "content": BENCH_PROMPT}]
    for _ in range(1 + BENCH_ROUNDS):  # the first one compiles kernels
        engine.decoder.forget()  # the template begins all prompts alike
        reply = engine.reply(messages, bounded, stop=())
        for _delta in reply:
            pass
        usages.append(reply.answer.usage)
    measured = usages[1:]
    return {
        "settings": bounded.document(),
        "prompt_tokens": measured[0].prompt_tokens,
        "new_tokens": measured[0].new_tokens,
        "first_token_seconds": statistics.median(usage.first_seconds for usage in measured),
        "tokens_per_second": statistics.median(usage.tokens_per_second for usage in measured),
    }
