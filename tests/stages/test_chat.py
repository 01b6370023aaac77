"""06_chat.py as a program: its answers, its endpoint, and what it refuses."""

import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparselong.chat import session
from sparselong.chat.engine import Engine
from sparselong.chat.settings import Settings
from sparselong.chat.sources import Source
from sparselong.data import render_prompt
from sparselong.model import load_model
from tests.conftest import ROOT, load_script

QUESTION = "Count to three."
DAY = datetime.date(2026, 1, 31)


@pytest.fixture(scope="module")
def chat():
    return load_script("06_chat").main


@pytest.fixture
def arguments(untrained_base, tmp_path) -> list[str]:
    """A model in a directory, and no run yet."""
    options = ["--run-dir", str(tmp_path / "run"), "--model", str(untrained_base)]
    return ["--config", str(ROOT / "configs/tiny.yaml"), *options]


def environment(**variables):
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def test_greedy_answers_are_those_of_transformers(untrained_base):
    engine = Engine(Source(untrained_base), "base", 256, DAY)
    messages = [{"role": "user", "content": QUESTION}]
    settings = Settings(max_new_tokens=24, temperature=0)
    prompt = render_prompt(engine.tokenizer, messages, today=DAY, reasoning_effort="medium")
    ids = torch.tensor([prompt])
    found = load_model(untrained_base).generate(
        ids, max_new_tokens=24, do_sample=False, eos_token_id=list(engine.stop)
    )
    for _ in range(2):  # the second time from the cache
        reply = engine.reply(messages, settings)
        text = "".join(delta.text for delta in reply)
        usage = reply.answer.usage
        assert usage.new_tokens == found.shape[1] - ids.shape[1]
        assert usage.prompt_tokens == len(prompt)
        tokens = found[0, ids.shape[1] :].tolist()
        marks = set(engine.tokenizer.all_special_ids)
        plain = engine.tokenizer.decode([token for token in tokens if token not in marks])
        assert "".join(text.split()) == "".join(plain.split())
    assert usage.reused_tokens >= len(prompt) - 1


def test_one_question_as_json(chat, arguments, capsys):
    options = ["--prompt", QUESTION, "--seed", "3", "--max-new-tokens", "12", "--json"]
    documents = []
    for _ in range(2):
        assert chat([*arguments, *options]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    first, second = documents
    assert first["message"] == second["message"] and first["seed"] == 3
    assert first["usage"]["new_tokens"] <= 12 and first["status"] == "done"
    assert first["model"] == Path(arguments[-1]).name
    assert first["load_seconds"] > 0 and first["usage"]["first_seconds"] > 0


def test_a_question_from_a_pipe_is_answered_on_stdout(arguments, forked_python):
    command = [
        forked_python,
        "06_chat.py",
        *arguments,
        "--max-new-tokens",
        "8",
        "--temperature",
        "0",
    ]
    done = subprocess.run(
        command,
        input=QUESTION.encode(),
        capture_output=True,
        cwd=ROOT,
        env=environment(),
        check=True,
    )
    asked = subprocess.run(
        [*command, "--prompt", QUESTION],
        capture_output=True,
        cwd=ROOT,
        env=environment(),
        check=True,
    )
    assert done.stdout == asked.stdout and b"opened in" in done.stderr


def test_bench_measures_loading_and_decoding_apart(chat, arguments, capsys, monkeypatch):
    monkeypatch.setattr(session, "BENCH_TOKENS", 16)
    assert chat([*arguments, "--bench", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tokens_per_second"] > 0 and document["first_token_seconds"] > 0
    assert document["new_tokens"] == 16 and document["load_seconds"] > 0


def test_a_dry_run_opens_nothing(chat, arguments, tmp_path, capsys, monkeypatch):
    assert chat([*arguments, "--dry-run"]) == 0
    assert "context_tokens: 256" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("SPARSELONG_TOKEN", "long-and-random")
    assert chat([*arguments, "--web", "--share", "--dry-run"]) == 0
    monkeypatch.setenv("SPARSELONG_TOKEN", "naïve")
    assert chat([*arguments, "--web", "--share", "--dry-run"]) == 2
    assert "visible ASCII" in capsys.readouterr().err


def test_a_conversation_in_a_terminal_has_no_document(chat, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert chat([*arguments, "--json"]) == 2
    assert "--json has no document" in capsys.readouterr().out


def test_without_stdin_there_is_no_question(chat, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)  # as after <&- in a shell
    assert chat(arguments) == 2
    assert "stdin cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (["--model", "finetuned"], 1, "02_compress"),
        (["--model", "compressed"], 1, "02_compress"),
        (["--model", "/nowhere"], 2, "/nowhere"),
        (["--model", "{tmp}", "--prompt", "x"], 1, "tokenizer.json"),
        (["--prompt", ""], 2, "--prompt"),
        (["--prompt", "x", "--serve"], 2, "several things"),
        (["--prompt", "x", "--temperature", "-1"], 2, "--temperature"),
        (["--prompt", "x", "--reasoning", "most"], 2, "--reasoning"),
        (["--prompt", "x", "--top-k", "1.5"], 2, "--top-k"),
        (["--prompt", "x", "--context", "1"], 2, "--context"),
        (["--prompt", "long " * 500], 1, "too long"),
        (["--prompt", "x", "--context", "200000"], 1, "131,072 positions"),
        (["--prompt", "bad\udcff"], 2, "--prompt"),
        (["--prompt", "x", "--system", "bad\udcff"], 2, "--system"),
        (["--serve", "--system", "x"], 2, "--system"),
        (["--serve", "--port", "70000"], 2, "--port"),
        (["--serve", "--host", "0.0.0.0"], 2, "token"),
        (["--web", "--host", "::"], 2, "token"),
        (["--web", "--share"], 2, "--share would let other machines"),
        (["--serve", "--share"], 2, "--web beside it"),
    ],
)
def test_bad_input_is_refused(chat, arguments, tmp_path, capsys, monkeypatch, options, code, named):
    monkeypatch.delenv("SPARSELONG_TOKEN", raising=False)
    options = [option.format(tmp=tmp_path) if "{" in option else option for option in options]
    assert chat([*arguments, *options]) == code
    assert named in capsys.readouterr().err


def test_an_adapter_of_attention_is_merged(untrained_base, tmp_path, chat, arguments, capsys):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        load_model(untrained_base),
        LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.peft_config["default"].base_model_name_or_path = str(untrained_base)
    model.save_pretrained(tmp_path / "adapter")
    engine = Engine(Source(untrained_base, tmp_path / "adapter"), "a", 64, DAY)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted, found = model(ids).logits, engine.model(ids).logits
        plain = load_model(untrained_base)(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 1e-2
    options = ["--model", str(tmp_path / "adapter"), "--prompt", "x"]
    assert chat([*arguments, *options, "--max-new-tokens", "2"]) == 0
    path = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    for wrong in (
        {name.replace("self_attn", "attn"): weight for name, weight in weights.items()},
        dict(list(weights.items())[1:]),
        {**weights, "base_model.model.lm_head.lora_A.weight": torch.zeros(1)},
    ):
        save_file(wrong, path)
        assert chat([*arguments, *options]) == 1
        assert f"lacks {len(weights.keys() - wrong.keys())} of 16" in capsys.readouterr().err
    path.write_bytes(b"junk" * 9)
    assert chat([*arguments, *options]) == 1
    (tmp_path / "adapter/masks.safetensors").touch()
    assert chat([*arguments, *options]) == 2
    assert "mask and rounding" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(untrained_base, tmp_path, chat, arguments, capsys):
    shutil.copytree(untrained_base, tmp_path / "other")
    path = tmp_path / "other/tokenizer.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("<|message|>", "<|massage|>"), encoding="utf-8")
    assert chat([*arguments, "--model", str(tmp_path / "other"), "--prompt", "x"]) == 1
    assert "tokenizer" in capsys.readouterr().err


def test_the_endpoint_answers_until_a_signal(arguments, forked_python):
    process = subprocess.Popen(
        [forked_python, "06_chat.py", *arguments, "--web", "--port", "0", "--json",
         "--host", "127.0.0.2"],
        stdout=subprocess.PIPE, cwd=ROOT, env=environment(),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        body = {
            "model": first["model"],
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": 6,
        }
        request = urllib.request.Request(
            f"{first['address']}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["usage"]["completion_tokens"] <= 6
        with urllib.request.urlopen(first["address"], timeout=60) as response:
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
            assert b"<!doctype html>" in response.read()
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert json.loads(rest)["requests"] == {"200": 2}
    finally:
        if process.poll() is None:
            process.kill()


def test_a_port_that_is_in_use_is_named(chat, arguments, capsys, monkeypatch):
    monkeypatch.setattr(session, "use_model", None)  # before the model is opened
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert chat([*arguments, "--serve", "--port", port]) == 1
    assert f"127.0.0.1:{port} cannot be bound" in capsys.readouterr().err
