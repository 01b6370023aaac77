"""The command line of 06_chat.py: which model, how it answers, and where. No torch."""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from typing import Any

from sparselong.chat.settings import EFFORTS, Settings
from sparselong.chat.sources import check_named, name_of, place_of, room_of
from sparselong.config import Config
from sparselong.errors import ConfigError
from sparselong.processes import is_one_machine, joined_rank
from sparselong.run import Stage

TOKEN_VARIABLE = "SPARSELONG_TOKEN"
MOST_QUESTION_BYTES = 1 << 20
NAMES = {name: f"--{name.replace('_', '-')}" for name in Settings().document()}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the script's own options."""
    standard = Settings()
    parser.add_argument(
        "--model",
        default="finetuned",
        help="base, compressed, finetuned, or a checkpoint's directory (default %(default)s)",
    )
    parser.add_argument("--prompt", help="answer this and end; - reads it from stdin")
    parser.add_argument("--system", help="system message; default: the chat template's own")
    parser.add_argument("--reasoning", default=standard.reasoning, help=f"{', '.join(EFFORTS)}")
    parser.add_argument("--show-thinking", action="store_true", help="show the analysis channel")
    parser.add_argument("--context", type=int, help="most tokens of a conversation (default: "
                        "sequence_len of the config)")  # fmt: skip
    for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed"):
        default = getattr(standard, name)
        text = "drawn for each answer" if default is None else default
        parser.add_argument(NAMES[name], default=default, help=f"default: {text}")
    where = parser.add_argument_group("where")
    where.add_argument("--serve", action="store_true", help="an OpenAI-compatible endpoint")
    where.add_argument("--web", action="store_true", help="the endpoint, with a page to chat on")
    where.add_argument("--host", default="127.0.0.1", help="address to bind (default %(default)s); "
                       f"any but this machine's own needs a token in {TOKEN_VARIABLE}")  # fmt: skip
    where.add_argument("--share", action="store_true", help="with --web: on every address of this "
                       f"machine, with {TOKEN_VARIABLE} as the password")  # fmt: skip
    where.add_argument("--port", type=int, default=8000, help="default %(default)s")
    where.add_argument("--queue", type=int, default=16, help="requests that may wait for the model "
                       "(default %(default)s)")  # fmt: skip
    where.add_argument("--bench", action="store_true", help="measure loading, first token, speed")


def check_options(arguments: argparse.Namespace, token: str | None) -> Settings:
    """Return the settings of the command line.

    Args:
        arguments: the parsed command line.
        token: the bearer token that requests to the endpoint must have.

    Raises:
        ConfigError: options exclude each other, or a value cannot be used.
    """
    chosen = [f"--{name}" for name in ("serve", "web", "bench") if getattr(arguments, name)]
    chosen += ["--prompt"] if arguments.prompt is not None else []
    if len(chosen) > 1:
        raise ConfigError(
            "the command line asks for several things", "one of them", " ".join(chosen), "keep one"
        )
    for name in ("prompt", "system"):
        _check_text(name, getattr(arguments, name))
    if arguments.system and (arguments.serve or arguments.web or arguments.bench):
        raise _refuse("--system", "a question or a conversation in the terminal", chosen[0])
    check_named(arguments.model)
    if arguments.context is not None and arguments.context < 2:
        raise _refuse("--context", "at least 2 tokens", arguments.context)
    if not 0 <= arguments.port < 1 << 16:
        raise _refuse("--port", "0 (any free one) to 65535", arguments.port)
    if arguments.queue < 0:
        raise _refuse("--queue", "0 or more requests", arguments.queue)
    if arguments.share and not arguments.web:
        raise _refuse("--share", "--web beside it", "no --web")
    if token and not (token.isascii() and token.isprintable() and token == token.strip()):
        raise ConfigError(
            f"{TOKEN_VARIABLE} cannot be sent in a request's header",
            "visible ASCII characters",
            "others, or spaces around them",
            "set it to a long random text of letters and digits",
        )
    host = host_of(arguments)
    if (arguments.serve or arguments.web) and not is_own(host) and not token:
        asked = "--share" if arguments.share else f"--host {host}"
        raise ConfigError(
            f"{asked} would let other machines use the model",
            f"a bearer token in the environment variable {TOKEN_VARIABLE}",
            "no token",
            f"set {TOKEN_VARIABLE} to a long random text, or leave the option away",
        )
    return Settings().changed({name: getattr(arguments, name) for name in NAMES}, NAMES)


def _check_text(name: str, text: str | None) -> None:
    """Raise ConfigError if the shell passed bytes that are no text."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise _refuse(f"--{name}", "text in this terminal's encoding", ascii(text)[:80]) from error


def check_processes(config: Config) -> None:
    """Raise unless the processes that torchrun started, if it did, can share one model.

    Raises:
        ConfigError: they are on several machines, or the config asks for another number.
    """
    if joined_rank() is None:
        return
    size, degree = int(os.environ["WORLD_SIZE"]), config.expert_parallel_degree
    if not is_one_machine():
        raise ConfigError(
            "a model cannot be shared by processes on several machines",
            "processes on one machine, which exchange in every layer",
            f"LOCAL_WORLD_SIZE={os.environ['LOCAL_WORLD_SIZE']}, WORLD_SIZE={size}",
            "torchrun --standalone --nproc_per_node=N 06_chat.py ...",
        )
    if degree not in ("auto", size):
        raise ConfigError(
            f"{size} processes would share the model",
            f"expert_parallel_degree: auto, or {size}",
            f"expert_parallel_degree: {degree}",
            f"set expert_parallel_degree=auto, or torchrun --nproc_per_node={degree}",
        )


def rank_arguments(stage: Stage) -> list[str]:
    """Return the Python arguments that run a rank beside rank 0."""
    return ["-m", "sparselong.chat.rank", str(stage.dir)]


def host_of(arguments: argparse.Namespace) -> str:
    """Return the address to bind."""
    return "0.0.0.0" if arguments.share else arguments.host


def is_own(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_question(prompt: str) -> str:
    """Return the question of `--prompt`, from stdin if it is `-`.

    Raises:
        ConfigError: it is empty, too long, or no UTF-8.
    """
    text = prompt
    if prompt == "-":
        data = b"" if sys.stdin is None else sys.stdin.buffer.read(MOST_QUESTION_BYTES + 1)
        if len(data) > MOST_QUESTION_BYTES:
            raise _refuse("stdin", f"at most {MOST_QUESTION_BYTES:,} bytes", "more")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _refuse("stdin", "text in UTF-8", str(error)) from error
    if not text.strip():
        raise _refuse("stdin" if prompt == "-" else "--prompt", "a question", "nothing")
    return text


def _refuse(name: str, expected: str, found: Any) -> ConfigError:
    return ConfigError(f"{name} cannot be used", expected, str(found), f"correct {name}")


def plan_chat(stage: Stage, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what would be opened, for `--dry-run`; it need not be there yet."""
    check_processes(stage.config)
    return {
        "stage": stage.name,
        "run_dir": str(stage.run_dir),
        "model": name_of(stage, arguments.model),
        "directory": str(place_of(stage, arguments.model)),
        "needs": list(stage.reads),
        "context_tokens": room_of(stage.config, arguments.context),
        "settings": check_options(arguments, os.environ.get(TOKEN_VARIABLE)).document(),
    }


def show(document: dict[str, Any]) -> str:
    """Return a document for display; an answer was displayed as it came."""
    if "message" in document:
        return ""
    return "\n".join(f"{key}: {_text(value)}" for key, value in document.items())


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={each}" for key, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
