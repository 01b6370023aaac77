"""The schema: strictness, YAML pitfalls, profiles, overrides, generated documentation."""

import re
from pathlib import Path

import pytest

from sparselong.config import docs as config_docs
from sparselong.config.keys import known_keys
from sparselong.config.overrides import refuse_repeated
from sparselong.config.profiles import PROFILES
from sparselong.config.schema import Config, dump, hash_sections, load
from sparselong.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_load_and_round_trip(path, tmp_path):
    config = load(path)
    assert load(write(tmp_path, dump(config))) == config
    assert config.shared_dense.sparsity == "2:4" and config.shared_dense.weight_bits == 4
    assert config.finetuning_modifiers.MagnitudePruningModifier.update_frequency == 0.05


def test_values_of_the_original_design():
    config = load(CONFIGS / "gpt-oss-120b-4x3090.yaml")
    assert (config.sequence_len, config.sequence_parallel_degree) == (16384, 4)
    # The design gathers one head at a time, which leaves a large GPU idle.
    assert (config.ring_attn_func, config.heads_k_stride) == ("varlen_llama3", 4)
    assert config.flash_attention and config.micro_batch_size == 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_comments_are_generated_from_the_schema(path):
    assert config_docs.render(path) == path.read_text(), "run python -m sparselong.config.docs"


def test_editor_schema_is_generated():
    assert config_docs.schema_text() == (CONFIGS / "schema.json").read_text()


def test_every_key_is_documented():
    for key, section in known_keys(Config).items():
        name = key.rsplit(".", 1)[-1]
        field = section.model_fields[name]
        is_section = isinstance(field.annotation, type) and hasattr(
            field.annotation, "model_fields"
        )
        assert field.description or (is_section and field.annotation.__doc__), key


def test_yaml_values_are_read_as_intended(tmp_path):
    text = "shared_dense:\n  sparsity: 2:4\ntraining:\n  learning_rate: 1e-4\n  max_steps: 010\n"
    config = load(write(tmp_path, text))
    assert config.shared_dense.sparsity == "2:4"
    assert config.training.learning_rate == 1e-4
    assert config.training.max_steps == 10
    assert load(write(tmp_path, "experts:\n  sparsity: none\n")).experts.sparsity == "none"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seed: 1\nmodel:\n  bas: tiny\n", ["unknown key model.bas", "line 3", "model.base"]),
        ("sequence_length: 3\n", ["unknown key sequence_length", "line 1", "sequence_len?"]),
        (
            "seed: 1\nmicro_batch_size: two\n",
            ["micro_batch_size", "line 2", "a whole number", "'two'"],
        ),
        ("seed: 1.5\n", ["seed", "a whole number", "seed=42"]),
        ("flash_attention: 1\n", ["flash_attention", "true or false"]),
        ("attention_backend: fa2\n", ["attention_backend", "line 1", "torch_flash"]),
        ("attention_backend: torch_cudnn\n", ["attention_backend", "windows", "auto"]),
        (
            "flash_attention: false\nattention_backend: triton\n",
            ["attention_backend: triton needs flash_attention: true"],
        ),
        ("shared_dense:\n  weight_bits: 5\n", ["weight_bits", "4, 8 or 16", "5"]),
        ("shared_dense: 4\n", ["shared_dense", "keys with values", "shared_dense.weight_bits=4"]),
        ("seed: 1\nseed: 2\n", ["seed is repeated", "line 2", "line 1"]),
        ("seed: [\n", ["not valid YAML"]),
        ("- 1\n", ["not a config"]),
        ("training:\n  save_steps: 30\n  eval_steps: 20\n", ["multiple"]),
        ("lora:\n  expert_targets: [up_proj]\n", ["expert_targets", "line 2", "gate_up_proj"]),
        ("lora:\n  expert_targets: [down_proj]\n", ["need lora.expert_r"]),
        ("lora:\n  expert_r: 8\n", ["lora.expert_r: 8 has no effect"]),
        (
            "lora:\n  expert_targets: [down_proj, down_proj]\n  expert_r: 8\n",
            ["lists a weight twice"],
        ),
        (
            "experts:\n  sparsity: '2:4'\nlora:\n  expert_targets: [down_proj]\n  expert_r: 8\n",
            ["experts.sparsity: none", "dropped"],
        ),
        ("lora:\n  expert_dtype: bfloat16\n", ["bfloat16 has no effect"]),
        ("expert_parallel_degree: all\n", ["line 1", "'auto'", "a whole number", "'all'"]),
        ("expert_parallel_degree: 0\n", ["line 1", "'auto'", "a number of at least 1"]),
        ("training:\n  logging_steps: 7\n", ["multiple", "logging_steps"]),
        ("profile: fast\n", ["profile", "quick_test"]),
    ],
)
def test_bad_files_are_refused_with_location_and_fix(tmp_path, text, parts):
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("seed", "malformed"),
        ("=3", "malformed"),
        ("learning_rate=3", "did you mean training.learning_rate?"),
        ("shared_dense.sparsty=none", "did you mean shared_dense.sparsity?"),
        ("training.max_steps=", "training.max_steps"),
        ("training.max_steps=0", "a number of at least 1"),
        ("lora.target_modules=q_proj", "lora.target_modules"),
        ("lora.target_modules=[]", "at least 1 item"),
        ("evaluation.tasks=[]", "at least 1 item"),
        ("sequence_len=1", "a number of at least 2"),
        ("training.learning_rate=.inf", "finite"),
    ],
)
def test_bad_overrides_are_refused(override, part):
    with pytest.raises(ConfigError, match="(?s)" + part.replace("?", r"\?")):
        load(CONFIGS / "tiny.yaml", [override])


@pytest.mark.parametrize(
    ("override", "expected", "fix"),
    [
        (
            "training.learning_rate=-1e-3",
            "a number above 0",
            "for example training.learning_rate=0.0002, the default",
        ),
        ("lora.r=0", "a number of at least 1", "for example lora.r=16, the default"),
        (
            "data.validation_fraction=5",
            "a number below 1",
            "for example data.validation_fraction=0.05, the default",
        ),
        (
            "profile=quick",
            "'quick_test', 'standard', 'high_quality' or 'memory_efficient'",
            "did you mean profile=quick_test?",
        ),
        ("lora.target_modules=v_proj", "a list", "for example lora.target_modules=[v_proj]"),
        ("lora.target_modules=[up]", "'v_proj' or 'o_proj'", "lora.target_modules=[q_proj]"),
        ("data.date=31.01.2026", "a date in the format YYYY-MM-DD", "data.date=2026-01-31"),
        (
            "training.save_steps=30",
            "training.save_steps (30) must be a multiple",
            "change training.save_steps or training.eval_steps",
        ),
        ("data.train=[{source: a, wieght: 3}]", "source or weight", "mean weight?"),
        ("training.learning_rte=1", "a known key, such as training.learning_rate", "mean"),
        (
            "data.train=[{source: a, weight: 1}, {source: b}]",
            "a weight for each source",
            "'data.train=[{source: a, weight: 1}, {source: b, weight: 1}]'",
        ),
    ],
)
def test_a_fix_is_an_override_that_is_accepted(override, expected, fix):
    with pytest.raises(ConfigError) as caught:
        load(CONFIGS / "tiny.yaml", [override])
    assert expected in caught.value.expected and fix in caught.value.fix
    found = re.search(r"[\w.]+=(\[[^]]*\]|[\w.-]+)", caught.value.fix)
    assert "mean" in fix or fix.startswith("change") or load(CONFIGS / "tiny.yaml", [found[0]])


def test_a_key_of_a_source_that_is_like_no_other_is_not_guessed():
    with pytest.raises(ConfigError, match="unknown key zzzz in data.train") as caught:
        load(CONFIGS / "tiny.yaml", ["data.train=[{source: a, zzzz: 3}]"])
    assert caught.value.expected == "source or weight" and "mean" not in caught.value.fix


@pytest.mark.parametrize("given", ["[a.jsonl, b.csv]", "a.jsonl,b.csv", "[a.jsonl,b.csv]"])
def test_files_without_their_keys_are_told_the_form_of_a_list(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    form = "data.train=[{source: a.jsonl}, {source: b.csv}]"
    for path, overrides in [
        (CONFIGS / "tiny.yaml", [f"data.train={given}"]),
        (write(tmp_path, f"data:\n  train: {given}\n"), []),
    ]:
        with pytest.raises(ConfigError, match="data.train is not valid") as caught:
            load(path, overrides)
        assert caught.value.fix.removeprefix("for example ") == f"'{form}'"
    with pytest.raises(ConfigError, match="source: owner/b"):
        load(CONFIGS / "tiny.yaml", ["data.train=owner/a,owner/b"])
    for path in ("/a,b/c.jsonl", "data/x,y.jsonl"):  # files that may have been moved since
        assert load(CONFIGS / "tiny.yaml", [f"data.train={path}"]).data.train == path
    (tmp_path / "a.jsonl,b.csv").write_text("")
    assert load(CONFIGS / "tiny.yaml", ["data.train=a.jsonl,b.csv"]).data.train == "a.jsonl,b.csv"
    assert len(load(CONFIGS / "tiny.yaml", [form]).data.shares) == 2


@pytest.mark.parametrize(
    "words",
    [
        ("training.learning_rate=1e-3", "seed=1", "training.learning_rate=2e-3"),
        ("model.base=tiny", "model.base=other"),
        ("lora.r=4", "lora={alpha: 5}"),
    ],
)
def test_a_command_line_with_two_values_for_a_key_is_refused(words):
    with pytest.raises(ConfigError) as caught:
        refuse_repeated(words)
    assert caught.value.what.startswith(f"{words[0].partition('=')[0]} is set twice")
    assert caught.value.found == f"{words[0]} and {words[-1]}"


def test_a_key_may_be_repeated_and_completed():
    refuse_repeated(["seed=1", "lora={r: 4}", "seed=1", "lora.alpha=5", "lora.r_other=3"])


@pytest.mark.parametrize("text", ["", "\n", "# profile: standard\n", "{}\n"])
def test_an_empty_file_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="is empty"):
        load(write(tmp_path, text))


def keep(key: str, *overrides: str) -> Config:
    """Load the 20b config with `training.<key>=always`."""
    asked = [f"training.{key}=always", "sequence_parallel_degree=1", *overrides]
    return load(CONFIGS / "gpt-oss-20b-1x3090.yaml", asked)


@pytest.mark.parametrize(
    ("key", "override", "why"),
    [
        ("keep_attention", "training.gradient_checkpointing=false", "gradient_checkpointing"),
        ("keep_experts", "training.gradient_checkpointing=false", "gradient_checkpointing"),
        ("keep_attention", "flash_attention=false", "flash_attention"),
        ("keep_experts", "expert_parallel_degree=2", "2 processes share the experts"),
    ],
)
def test_always_is_refused_for_what_cannot_be_kept(key, override, why):
    with pytest.raises(ConfigError, match=rf"(?s)training.{key}: use auto or never.*{why}"):
        keep(key, override)
    assert key in load(CONFIGS / "gpt-oss-20b-1x3090.yaml", [override]).nothing_to_keep("cuda")


def test_always_is_accepted_for_what_can_be_kept():
    """Experts with any attention; attention if it is ours, as it is for split sequences."""
    for config in (
        keep("keep_attention"),
        keep("keep_experts", "flash_attention=false", "training.keep_attention=never"),
        keep("keep_attention", "flash_attention=false", "sequence_parallel_degree=2"),
    ):
        asked = ("keep_attention", "keep_experts")
        always = {key for key in asked if getattr(config.training, key) == "always"}
        assert always and not always & set(config.nothing_to_keep("cuda"))
        assert set(config.nothing_to_keep("cpu")) == set(asked)


def test_shared_experts_keep_nothing():
    """With `auto`, the number of processes is known only where the stage runs."""
    config = load(CONFIGS / "gpt-oss-20b-1x3090.yaml")
    assert config.expert_parallel_degree == "auto" and not config.nothing_to_keep("cuda")
    assert not config.nothing_to_keep("cuda", 1)
    assert list(config.nothing_to_keep("cuda", 4)) == ["keep_experts"]
    number = load(CONFIGS / "gpt-oss-20b-1x3090.yaml", ["expert_parallel_degree=4"])
    assert number.expert_parallel_degree == 4
    assert list(number.nothing_to_keep("cuda")) == ["keep_experts"]
    assert not number.nothing_to_keep("cuda", 1)


def test_missing_file():
    with pytest.raises(ConfigError, match="cannot be read"):
        load("configs/absent.yaml")


def test_overrides_take_precedence_and_reach_empty_sections(tmp_path):
    path = write(tmp_path, "seed: 1\nlora:\n  # r: 4\n")
    config = load(path, ["seed=7", "lora.target_modules=[q_proj]", "shared_dense.sparsity=none"])
    assert config.seed == 7 and config.lora.target_modules == ("q_proj",)
    assert config.shared_dense.sparsity == "none"


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_set_only_unset_keys(tmp_path, profile):
    path = write(tmp_path, f"profile: {profile}\ncalibration:\n  samples: 3\n")
    config = load(path).model_dump()
    assert config["calibration"]["samples"] == 3
    for key, value in PROFILES[profile].items():
        section = config
        for part in key.split("."):
            section = section[part]
        assert key == "calibration.samples" or section == value
    assert load(path, ["profile=standard"]).training == Config().training


def test_hash_depends_on_the_named_sections_only():
    plain, other = Config(), load(CONFIGS / "tiny.yaml")
    changed = plain.model_copy(update={"seed": 1})
    assert hash_sections(plain, ("model",)) == hash_sections(changed, ("model",))
    assert hash_sections(plain, ("seed",)) != hash_sections(changed, ("seed",))
    assert hash_sections(plain, ("model",)) != hash_sections(other, ("model",))


@pytest.mark.parametrize(
    "text",
    ["1e5", "12e4567", "+.5e3", "yes", "010", "0x1f", "null", "~", "1_000", "2:4", "a #b", ".5"],
)
def test_strings_that_look_like_other_values_round_trip(text, tmp_path):
    config = load(CONFIGS / "tiny.yaml", [f"model.revision={text}"])
    assert config.model.revision == text
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "gpu", "price"),
    [
        ("null", "NVIDIA H200", None),
        ("2", "NVIDIA H200", 2.0),
        ("{H200: 3.5, RTX 3090: 0.25}", "NVIDIA H200", 3.5),
        ("{H200: 3.5, RTX 3090: 0.25}", "NVIDIA GeForce RTX 3090 Ti", 0.25),
        ("{H200: 3.5, RTX 3090: 0.25}", "NVIDIA A100-SXM4-80GB", None),
        ("{H200: 3.5}", "NVIDIA L4", None),
    ],
)
def test_a_price_is_for_every_gpu_or_for_a_type(text, gpu, price):
    config = load(CONFIGS / "tiny.yaml", [f"cost.per_gpu_hour={text}"])
    assert config.cost.price(gpu) == price


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{H20: 3}", "H100, H200, not H20"),
        ("{H200: 0}", "a price above 0 for H200"),
        ("0", "a number above 0"),
        ("[1]", "a number or: keys with values"),
        ("{H200: dear}", "a number"),
    ],
)
def test_other_prices_are_refused(text, part):
    with pytest.raises(ConfigError, match="cost.per_gpu_hour is not valid") as refusal:
        load(CONFIGS / "tiny.yaml", [f"cost.per_gpu_hour={text}"])
    assert part in refusal.value.expected
