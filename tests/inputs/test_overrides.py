"""Values of config keys on the command line and in files: taken as meant, or refused by name."""

import pwd

import pytest

from sparselong.config import load
from sparselong.config.schema import dump
from sparselong.errors import ConfigError
from tests.conftest import ROOT, load_script
from tests.inputs.conftest import Outcome

TINY = ROOT / "configs/tiny.yaml"


def value(key: str, text: str):
    found = load(TINY, [f"{key}={text}"])
    for part in key.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(
    "text",
    [
        *(
            "/data/base #2",
            "a: b",
            "[x]",
            "{a: 1}",
            "'quoted'",
            "1e5",
            "010",
            "true",
            "null",
            "2:4",
        ),
        *("&a", "*a", "!x", "- a", "a=b", "%", "@a", "`a`", '"', "$HOME/x", "x::y[*]", "ünï çödé"),
        *("None", "a\\nb", "|", ">", "?"),
    ],
)
@pytest.mark.parametrize("key", ["model.base", "model.revision", "data.train"])
def test_the_text_of_a_string_key_is_its_value(key, text):
    assert value(key, text) == text


@pytest.mark.parametrize("key", ["data.validation", "training.wandb_project"])
def test_null_is_null_for_an_optional_key_only(key):
    assert value(key, "null") is None
    assert value("data.validation", "./null") == "./null"
    assert value(key, "nullx") == "nullx" and value(key, "NULL") == "NULL"


def test_choices_are_taken_as_they_are():
    assert value("experts.sparsity", "2:4") == "2:4"
    assert value("profile", "quick_test") == "quick_test"
    with pytest.raises(ConfigError, match=r"(?s)experts.sparsity.*'2:4 #'"):
        value("experts.sparsity", "2:4 #")


def test_other_keys_are_yaml():
    assert value("evaluation.tasks", "[a, b]") == ("a", "b")
    assert value("training.max_steps", "null") is None
    assert value("lora.router", "true") is True
    assert value("training.learning_rate", "1e-4") == 1e-4


def test_the_last_value_of_a_key_is_used():
    assert load(TINY, ["seed=1", "seed=2", "model.base=a", "model.base=b #"]).seed == 2
    assert load(TINY, ["model.base=a", "model.base=b #"]).model.base == "b #"


@pytest.mark.parametrize("key", ["model.base", "data.train", "data.validation"])
def test_homes_are_expanded_in_paths_from_files_and_overrides(key, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/somewhere")
    assert value(key, "~/x") == "/somewhere/x" and value(key, "~") == "/somewhere"
    home_of_root = pwd.getpwnam("root").pw_dir
    assert value(key, "~root/x") == f"{home_of_root}/x" and value(key, "./~x") == "./~x"
    section, name = key.split(".")
    (tmp_path / "c.yaml").write_text(f"{section}:\n  {name}: ~/x\n")
    assert getattr(getattr(load(tmp_path / "c.yaml"), section), name) == "/somewhere/x"
    with pytest.raises(ConfigError, match="(?s)known user's home.*~nobody-of-that-name"):
        value(key, "~nobody-of-that-name/x")


def test_the_home_of_a_config_file_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("seed: 7\n")
    assert load("~/c.yaml").seed == 7


BLANK = ["", " ", "\t", "\u3000"]
ODD = [" a", "a ", "a\nb", "a\0b", "a\x7f", "\x1b[31m", "a\udcff"]
STRINGS = [
    *("model.base", "model.revision", "data.train", "data.validation", "training.wandb_project"),
]


@pytest.mark.parametrize("text", [*BLANK, *ODD])
@pytest.mark.parametrize("key", STRINGS)
def test_blank_and_unprintable_texts_are_refused(key, text, tmp_path):
    with pytest.raises(ConfigError, match=key):
        value(key, text)
    section, name = key.split(".")
    escaped = "".join(f"\\u{ord(c):04x}" for c in text)
    (tmp_path / "c.yaml").write_text(f'{section}:\n\n  {name}: "{escaped}"\n')
    with pytest.raises(ConfigError, match=f"{key} is not valid .*line 3"):
        load(tmp_path / "c.yaml")


@pytest.mark.parametrize("text", ["x" * 256, "ü" * 128, "a/" * 2100])
def test_a_path_that_cannot_exist_is_refused(text):
    with pytest.raises(ConfigError, match="(?s)model.base.*255 bytes"):
        value("model.base", text)


@pytest.mark.parametrize("override", ["model.base.x=1", "seed.x=1", "training.max_steps.a.b=1"])
def test_a_key_below_a_value_is_refused_and_not_ignored(override):
    with pytest.raises(ConfigError, match="unknown key"):
        load(TINY, [override])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seed: !!timestamp 2020-01-01\n", "not valid YAML"),
        ("seed: !!binary aGk=\n", "not valid YAML"),
        ("model:\n  base: !x y\n", "not valid YAML"),
        ("seed: !!int x\n", "not valid YAML"),
        (f"seed: {'9' * 5000}\n", "not valid YAML"),
        ("a: &a [*a]\n", "not valid YAML"),
        ("[" * 400, "not valid YAML"),
        ("seed: 1\n--- \nseed: 2\n", "not valid YAML"),
        ("? [a]\n: 1\n", "unknown key"),
        ("model:\n  base: 5\n", "line 2"),
        ("model:\n  base: ~\n", "line 2"),
        ("model:\n  base: [a]\n", "line 2"),
        ("profile: [a]\n", "line 1"),
        ("<<: {seed: 1}\n", "unknown key"),
    ],
)
def test_odd_yaml_is_explained(text, part, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=part):
        load(tmp_path / "c.yaml")


def test_a_byte_order_mark_is_accepted(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfseed: 7\n")
    assert load(tmp_path / "c.yaml").seed == 7
    (tmp_path / "c.yaml").write_bytes("seed: 7\n".encode("utf-16"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "script", ["01_health", "02_compress", "03_finetune", "04_eval", "05_export"]
)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nothing"], ["--nothing"]),
        (["--run-dir"], ["--run-dir"]),
        (["--run-dir", "-x"], ["--run-dir"]),
        (["--run-dir=-x"], ["--run-dir"]),
        (["--run-dir", ""], ["--run-dir"]),
        (["--run-dir", " "], ["--run-dir"]),
        (["--run-dir", "a\0b"], ["--run-dir"]),
        (["--run-dir", "a\udcff"], ["--run-dir", "UTF-8"]),
        (["--run-dir", "x" * 300], ["--run-dir", "255"]),
        (["--run-dir", "~nobody-of-that-name/x"], ["--run-dir", "home"]),
        (["--config", ""], ["--config"]),
        (["--config", "a\0b"], ["--config"]),
        (["--config", "/"], ["--run-dir"]),
        (["--config", "..yaml"], ["--run-dir"]),
        (["--config", str(ROOT)], ["cannot be read"]),
        (["-1"], ["-1"]),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_explained(script, arguments, words, capfd):
    arguments = [*(["--to", "mxfp4"] if script == "05_export" else []), *arguments]
    outcome = Outcome(load_script(script).main(arguments), *capfd.readouterr())
    outcome.assert_explained(*words)
    assert outcome.code == 2


def test_several_sources_are_a_list_in_file_and_override(tmp_path):
    text = "[{source: a.jsonl, weight: 1}, {source: 'b #2.csv', weight: 0.5}]"
    config = load(TINY, [f"data.train={text}"])
    named = {"data.train[0].source": "a.jsonl", "data.train[1].source": "b #2.csv"}
    assert config.data.named == named
    assert [share.weight for share in config.data.shares] == [1.0, 0.5]
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load(path) == config
    path.write_text("data:\n  train:\n  - source: x.parquet\n  validation: y\n")
    assert load(path).data.named == {"data.train[0].source": "x.parquet", "data.validation": "y"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[{source: a, weight: 0}]", "weight: a number above 0.*weight: 1"),
        ("[{weight: 1}]", "source: a value, which every one needs"),
        ("[{source: demo}]", "demo alone"),
        ("[{source: a, weight: 1}, {source: b}]", "for each source, or for none"),
        ("[{source: a}, {source: a}]", "each source once"),
        ("[{source: ./a.jsonl}, {source: a.jsonl}]", "each source once"),
        ("[{source: ''}]", "source: a text that is not empty"),
    ],
)
def test_lists_of_sources_are_refused_with_the_key(text, words):
    with pytest.raises(ConfigError, match=rf"(?s)data\.train is not valid.*{words}"):
        load(TINY, [f"data.train={text}"])
