"""The terminal's commands and display with a scripted model; tests/web uses a pseudo-terminal."""

import io
import json
import re
import signal
import threading

import pytest
from rich.console import Console

from sparselong.chat.answer import Answer, Usage
from sparselong.chat.settings import Settings
from sparselong.chat.stream import split_blocks
from sparselong.chat.terminal import COMMANDS, Terminal
from sparselong.data import Delta
from sparselong.errors import StageError
from tests.chat.engines import HELLO, ScriptedEngine


def run(tmp_path, *lines, engine=None, is_terminal=False, encoding="utf-8", **options):
    """Return the terminal after these lines, and what it showed."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", newline="\n")
    console = Console(file=file, force_terminal=is_terminal, width=80, markup=False, emoji=False)
    waiting = list(lines)

    def read_line(prompt):
        if not waiting:
            raise EOFError
        line = waiting.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    terminal = Terminal(
        engine or ScriptedEngine(), Settings(), tmp_path, console, read_line=read_line, **options
    )
    terminal.run()
    file.flush()
    return terminal, raw.getvalue().decode(encoding)


def plain(shown):
    """Return what was shown without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", shown)


def roles(terminal):
    return [message["role"] for message in terminal.conversation.messages]


def test_a_conversation_goes_on_with_its_earlier_turns(tmp_path):
    terminal, shown = run(tmp_path, "Hi", "And you?")
    assert roles(terminal) == ["user", "assistant", "user", "assistant"]
    assert [m["content"] for m in terminal.engine.asked[1][0]] == ["Hi", "Hello there!", "And you?"]
    assert "Hello there!" in shown and "Let me think" not in shown


def test_thinking_is_shown_on_request(tmp_path):
    assert "Let me think" in run(tmp_path, "Hi", show_thinking=True)[1]
    assert "Let me think" in run(tmp_path, "/reasoning", "Hi")[1]


def test_an_answer_of_thinking_alone_is_told(tmp_path):
    assert "(no answer" in run(tmp_path, "Hi", engine=ScriptedEngine(HELLO[:1]))[1]
    assert "(no answer" not in run(tmp_path, "Hi")[1]


def test_messages_of_several_lines(tmp_path):
    terminal, _ = run(tmp_path, "one\\", "two", '"""', "three", "", "/four", '"""')
    users = [m["content"] for m in terminal.conversation.messages if m["role"] == "user"]
    assert users == ["one\ntwo", "three\n\n/four"]


def test_every_command_is_listed_and_known(tmp_path):
    _, shown = run(tmp_path, *(name for name in COMMANDS if name != "/exit"), "/nonsense", "/exit")
    assert all(name in shown for name in COMMANDS)
    assert shown.count("is no command") == 1 and "/nonsense is no command" in shown


def test_clear_keeps_the_system_message(tmp_path):
    terminal, _ = run(tmp_path, "/system Be brief.", "Hi", "/clear", "Again")
    assert roles(terminal) == ["system", "user", "assistant"]
    assert terminal.engine.asked[1][0][0]["content"] == "Be brief."
    assert roles(run(tmp_path, "/system Be brief.", "/system -")[0]) == []


def test_retry_answers_the_same_question_again(tmp_path):
    terminal, shown = run(tmp_path, "/retry", "Hi", "/retry")
    assert roles(terminal) == ["user", "assistant"] and "there is no answer yet" in shown
    assert terminal.engine.asked[0][0] == terminal.engine.asked[1][0]


def test_settings_are_checked_and_used(tmp_path):
    terminal, shown = run(
        tmp_path, "/settings temperature=0 top_k=5", "/reasoning low", "/settings top_p=2",
        "/settings x=1", "/reasoning most", "Hi",
    )  # fmt: skip
    used = terminal.engine.asked[0][1]
    assert (used.temperature, used.top_k, used.top_p, used.reasoning) == (0, 5, 1.0, "low")
    assert "top_p is out of range" in shown and "x is not a setting" in shown
    assert "reasoning is out of range" in shown


def test_a_kept_conversation_is_loaded_and_goes_on(tmp_path):
    run(tmp_path, "Hi", "/save first talk")
    kept = json.loads((tmp_path / "conversations/first talk.json").read_text(encoding="utf-8"))
    assert [message["role"] for message in kept["messages"]] == ["user", "assistant"]
    terminal, shown = run(tmp_path, "/load", "/load first talk", "More")
    assert roles(terminal) == ["user", "assistant", "user", "assistant"]
    assert "first talk" in shown and "user: Hi" in shown


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b", ".x", ""])
def test_save_stays_in_its_folder(tmp_path, name):
    terminal, shown = run(tmp_path / "run", "Hi", f"/save {name}")
    assert "name cannot be used" in shown and roles(terminal) == ["user", "assistant"]
    assert not list(tmp_path.rglob("*.json"))


def test_a_refused_message_is_taken_back(tmp_path):
    engine = ScriptedEngine()
    engine.refusal = StageError("the conversation is too long", "fewer", "many", "/clear")
    terminal, shown = run(tmp_path, "Hi", engine=engine)
    assert roles(terminal) == [] and "too long" in shown


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path):
    step = threading.Event()
    engine = ScriptedEngine(step=step)
    threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,)).start()
    before = signal.getsignal(signal.SIGINT)
    terminal, shown = run(tmp_path, "Hi", "/reasoning", engine=engine)
    assert engine.replies[0].cancelled and "(stopped)" in shown
    assert roles(terminal) == ["user", "assistant"] and "reasoning medium" in shown
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_typing_clears_the_line(tmp_path):
    terminal, shown = run(tmp_path, KeyboardInterrupt(), "Hi")
    assert roles(terminal) == ["user", "assistant"] and "/exit or Ctrl-D" in shown


@pytest.mark.parametrize("is_terminal", [False, True])
def test_markup_and_control_characters_of_the_model_are_shown_not_obeyed(tmp_path, is_terminal):
    evil = "[red]x[/red] \x1b]0;title\x07 <script>alert(1)</script> \x1b[2J\x9b2J"
    _, shown = run(
        tmp_path, "Hi", engine=ScriptedEngine([Delta("final", evil, None)]), is_terminal=is_terminal
    )
    assert "[red]x[/red]" in shown and "<script>alert(1)</script>" in plain(shown)
    assert "\x1b]0;" not in shown and "\x07" not in shown and "\x1b[2J" not in shown
    assert "\x9b" not in shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("is_terminal", [False, True])
def test_terminals_of_other_encodings_lose_nothing(tmp_path, encoding, is_terminal):
    text = "- naïve\n- 日本\n\n```python\nx = '🙂'\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    engine = ScriptedEngine([Delta("final", piece, None) for piece in text])
    _, shown = run(tmp_path, "Hi", engine=engine, is_terminal=is_terminal, encoding=encoding)
    wanted = "日本".encode(encoding, "backslashreplace").decode(encoding)
    assert wanted in shown and "x = " in plain(shown)


@pytest.mark.parametrize(
    "text",
    ["Use <b>x</b>.", "<div>\n<p>\n</div>", "<!-- a -->", "[1]: http://x.y", "![a](http://x.y)"],
)
def test_what_markdown_renders_as_nothing_is_shown(tmp_path, text):
    engine = ScriptedEngine([Delta("final", text, None)])
    shown = plain(run(tmp_path, "Hi", engine=engine, is_terminal=True)[1])
    assert all(word in shown for word in re.findall(r"[^\s\[\]()]+", text))


def test_a_line_that_is_no_text_is_refused(tmp_path):
    """Bytes that the terminal's encoding lacks come as halves of surrogate pairs."""
    lines = ("/system bad\udcff", "bad\udcff", "/save bad\udcff", "Hi", "/save good")
    terminal, shown = run(tmp_path, *lines)
    assert shown.count("no text in this terminal's encoding") == 3
    assert roles(terminal) == ["user", "assistant"]
    assert (tmp_path / "conversations/good.json").is_file()


def test_markdown_is_split_where_a_block_ends():
    assert split_blocks("a\n\nb") == (["a"], "b")
    assert split_blocks("```\na\n\nb") == ([], "```\na\n\nb")
    assert split_blocks("```py\na\n\nb\n```\n\nc\n") == (["```py\na\n\nb\n```"], "c\n")
    assert split_blocks("- a\n- b\n\n") == (["- a\n- b"], "")


def test_long_answers_are_shown_whole(tmp_path):
    lines = [f"line {number}" for number in range(300)]
    engine = ScriptedEngine([*HELLO[:1], Delta("final", "\n\n".join(lines), None)])
    _, shown = run(tmp_path, "Hi", engine=engine, is_terminal=True)
    assert all(line in shown for line in lines)


def test_another_signal_than_ctrl_c_ends_the_program(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        run(tmp_path, KeyboardInterrupt("SIGTERM"), "Hi")


def test_a_model_that_cannot_answer_any_more_ends_the_program(tmp_path):
    engine = ScriptedEngine()
    engine.refusal = StageError("a rank is gone", "x", "y", "z")
    assert "a rank is gone" in run(tmp_path, "Hi", engine=engine)[1]
    engine.broken = RuntimeError("gone")
    with pytest.raises(StageError, match="a rank is gone"):
        run(tmp_path, "Hi", engine=engine)


@pytest.mark.parametrize(
    ("reason", "tokens", "repairs", "told"),
    [
        ("stop", 2048, {}, []),
        ("length", 2048, {}, ["the answer was cut at max_new_tokens 2,048"]),
        ("length", 30, {}, ["the answer was cut where the context is full (--context 1000)"]),
        (
            "stop",
            9,
            {"text before a header": 1, "unknown role": 2},
            ["not in the model's format: text before a header (1), unknown role (2)"],
        ),
    ],
)
def test_what_cut_an_answer_and_what_is_malformed_is_named(reason, tokens, repairs, told):
    answer = Answer([], reason, Usage(7, 0, tokens, 0.0, 1.0), 0, repairs)
    assert answer.faults(Settings().max_new_tokens, ScriptedEngine.most_tokens) == told
