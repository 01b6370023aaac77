#!/usr/bin/env python3
"""Stage 06: talk to a model of the run: one question, a conversation, an endpoint, a page.

    python 06_chat.py --run-dir runs/NAME --prompt "Why is the sky blue?"
    python 06_chat.py --run-dir runs/NAME                   a conversation in the terminal
    python 06_chat.py --run-dir runs/NAME --serve           OpenAI's chat completions at :8000/v1
    python 06_chat.py --run-dir runs/NAME --web             the same with a page to chat on

Opens the fine-tuned model, or with `--model` the base, the compressed one, or any gpt-oss
checkpoint in a directory. Conversations are kept in runs/NAME/06_chat/conversations. Without
--prompt, a question that is piped in is answered.

A model that does not fit on one GPU is shared by several processes, one for each GPU: as many as
stage 04 would start, or those in which torchrun started this script. Tokens are those of one
process.

Exit code 0 at the end, 1 if the model cannot be opened or asked, 2 for a usage or config error.
"""

import argparse
import os
import sys
from typing import Any

from sparselong.chat import (
    TOKEN_VARIABLE,
    add_options,
    check_options,
    check_processes,
    plan_chat,
    rank_arguments,
    reads_of,
    show,
)
from sparselong.processes import hide_launcher, is_joined, joined_rank
from sparselong.run import Stage, run_session

NAME = "06_chat"


def execute(stage: Stage, arguments: argparse.Namespace) -> dict[str, Any]:
    """Chat; torch is imported only after everything else is validated."""
    from sparselong.chat import chat

    return chat(stage, arguments, os.environ.get(TOKEN_VARIABLE))


def check(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Raise if the launcher's variables are not valid, or the options cannot be used."""
    if joined_rank() is None:
        hide_launcher()
    check_options(arguments, os.environ.get(TOKEN_VARIABLE))
    return reads_of(arguments.model)


def main(argv: list[str] | None = None) -> int:
    """Run the session, or under torchrun this process's part of it; return the exit code."""
    if not is_joined():
        return run(argv)
    from sparselong.processes import follow_or_lead

    return follow_or_lead(NAME, argv, run, rank_arguments, check_processes, add_options)


def run(argv: list[str] | None) -> int:
    """Run the session in this process; return its exit code."""
    text = "Talk to a model of the run."
    return run_session(NAME, text, argv, execute, plan_chat, show, add_options, check)


if __name__ == "__main__":
    sys.exit(main())
