"""Runs the terminal with a scripted model; argument: the folder for conversations."""

import sys
from pathlib import Path

from sparselong.chat.settings import Settings
from sparselong.chat.stream import make_console
from sparselong.chat.terminal import Terminal
from sparselong.data import Delta
from sparselong.registration import set_streams
from tests.chat.engines import HELLO, ScriptedEngine

TEXT = "# Title\n\nnaïve 日本 **bold**\n\n" + "\n\n".join(f"line {n}" for n in range(60))


def main() -> None:
    """Answer `long` slowly and at length, everything else with a greeting."""
    set_streams()
    engine = ScriptedEngine()
    answer = engine.reply

    def reply(messages, *given, **named):
        is_long = messages[-1]["content"] == "long"
        pieces = [Delta("final", TEXT[at : at + 4], None) for at in range(0, len(TEXT), 4)]
        engine.deltas, engine.delay = (pieces, 0.01) if is_long else (HELLO, 0.0)
        return answer(messages, *given, **named)

    engine.reply = reply
    Terminal(engine, Settings(), Path(sys.argv[1]), make_console()).run()


if __name__ == "__main__":
    main()
