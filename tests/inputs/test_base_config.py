"""config.json means the same to every stage, or is refused by name."""

import shutil
from pathlib import Path

import pytest

from sparselong.config import load
from sparselong.errors import StageError
from sparselong.memory.base_config import read_base_config
from sparselong.memory.shape import find_shape, read_shape
from sparselong.tiny import open_base
from tests.conftest import ROOT
from tests.inputs.base_files import GONE, ROPE, SIZES, TYPES, change_config


@pytest.fixture
def config_only(untrained_base, tmp_path) -> Path:
    """A folder with the small base's config.json alone."""
    folder = tmp_path / "only"
    folder.mkdir()
    shutil.copy(untrained_base / "config.json", folder)
    return folder


@pytest.mark.parametrize("value", [0, -1, "8", True, 8.0, None, GONE, [8]], ids=str)
@pytest.mark.parametrize("key", SIZES)
def test_a_size_is_a_positive_integer(config_only, key, value):
    with pytest.raises(StageError, match=key):
        read_base_config(change_config(config_only, **{key: value}))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: 9"),
        ({"num_experts": 16}, "num_local_experts: 8, num_experts: 16"),
        ({"experts_per_token": 2}, "experts_per_token: 2"),
        ({"num_local_experts": GONE, "experts_per_token": 4}, "no num_local_experts"),
        ({"num_hidden_layers": 10**9, "layer_types": GONE}, "1000000000"),
        ({"hidden_size": 144}, "hidden_size: 144"),
        ({"intermediate_size": 100}, "intermediate_size: 100"),
        ({"head_dim": 63}, "head_dim: 63"),
        ({"num_attention_heads": 5}, "5 and 2"),
        ({"layer_types": [*TYPES, *TYPES]}, "a list of 8"),
        ({"layer_types": TYPES[:3]}, "a list of 3"),
        ({"layer_types": [*TYPES[:3], "chunked_attention"]}, "chunked_attention"),
        ({"layer_types": [*TYPES[:3], ["full_attention"]]}, "full_attention"),
        ({"layer_types": "full_attention"}, "full_attention"),
        ({"layer_types": []}, "a list of 0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings"),
        ({"swiglu_limit": 5.0}, "swiglu_limit: 5.0"),
        ({"attention_bias": False}, "attention_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"text_config": {"vocab_size": 4}}, "text_config"),
        ({"dtype": "nn"}, "nn"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"eos_token_id": 2048}, "2048"),
        ({"pad_token_id": -1}, "pad_token_id"),
        ({"eos_token_id": [2041, "x"]}, "eos_token_id"),
        ({"rope_parameters": GONE}, "neither"),
        ({"rope_parameters": None}, "rope_parameters: null"),
        ({"rope_scaling": None}, "rope_scaling: null"),
        ({"rope_scaling": {**ROPE, "factor": 16.0}}, "two that differ"),
        ({"rope_parameters": {**ROPE, "rope_type": "linear"}}, "linear"),
        ({"rope_parameters": {**ROPE, "type": "default"}}, "default"),
        ({"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}, "none"),
        ({"rope_parameters": {k: v for k, v in ROPE.items() if k != "factor"}}, "factor"),
        ({"rope_parameters": {k: v for k, v in ROPE.items() if k != "truncate"}}, "truncate"),
        ({"rope_parameters": {**ROPE, "beta_fast": "32"}}, "beta_fast"),
        ({"rope_parameters": {**ROPE, "factor": float("nan")}}, "factor"),
        ({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {**ROPE, "rope_theta": 1e4}, "rope_theta": 150000}, "rope_theta"),
        ({"initial_context_length": 8192}, "8192"),
        ({"original_max_position_embeddings": 8}, "8 and 4096"),
        ({"is_causal": False}, "is_causal: false"),
        ({"is_causal": None}, "is_causal: null"),
        ({"output_router_logits": True}, "output_router_logits: true"),
        ({"model_type": "mixtral"}, "mixtral"),
        ({"model_type": GONE}, "None"),
        ({"architectures": ["GptOssForSequenceClassification"]}, "SequenceClassification"),
        ({"architectures": []}, "architectures"),
        ({"quantization_config": GONE}, "quant_method None"),
        ({"quantization_config": "mxfp4-ish"}, "mxfp4-ish"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "sparselong"}}, "already compressed"),
    ],
    ids=str,
)
def test_a_config_that_is_read_differently_is_refused(config_only, changes, word):
    path = change_config(config_only, **changes)
    with pytest.raises(StageError) as caught:
        read_shape(path)  # the plan's question, and stage 03's
    assert word in str(caught.value) and "…" not in str(caught.value)
    with pytest.raises(StageError) as again:
        open_base(config_only)  # stage 02's question
    assert str(again.value) == str(caught.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "cannot be read"),
        ("[1]", "a JSON list"),
        ("[" * 100_000, "cannot be read"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (
            '{"model_type": "gpt_oss", "vocab_size": 1, "vocab_size": 2}',
            "'vocab_size' occurs twice",
        ),
    ],
)
def test_a_damaged_config_is_refused(config_only, text, word):
    (config_only / "config.json").write_text(text)
    with pytest.raises(StageError, match=word):
        read_base_config(config_only / "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 8},
        {"num_local_experts": GONE, "num_experts": 8},
        {"rope_parameters": GONE, "rope_scaling": ROPE, "rope_theta": 150000},
        {
            "rope_parameters": {
                **{k: v for k, v in ROPE.items() if k != "rope_type"},
                "type": "yarn",
            }
        },
        {"layer_types": GONE},
        {"architectures": None, "swiglu_limit": 7, "experts_per_token": 4},
    ],
    ids=str,
)
def test_another_way_to_say_the_same_has_the_same_meaning(base, changes):
    wanted, shape = open_base(base)[1], read_shape(base / "config.json")
    change_config(base, **changes)
    found = open_base(base)[1]
    for key in (*SIZES, "layer_types"):
        assert getattr(found, key) == getattr(wanted, key), key
    assert {**found.rope_parameters, "type": "yarn"} == {**wanted.rope_parameters, "type": "yarn"}
    assert read_shape(base / "config.json") == shape


def test_full_layers_are_counted_from_their_types(config_only):
    types = ["full_attention", "full_attention", "full_attention", "sliding_attention"]
    assert read_shape(change_config(config_only, layer_types=types)).full_layers == 3
    assert read_shape(change_config(config_only, layer_types=GONE)).full_layers == 2
    published = load(ROOT / "configs/gpt-oss-20b-1x3090.yaml", []).model
    assert find_shape(published).full_layers == 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 2049}, ("embed_tokens", "2049")),
        ({"num_hidden_layers": 3, "layer_types": TYPES[:3]}, ("3 layers", "4 layers")),
        ({"num_hidden_layers": 5, "layer_types": GONE}, ("5 layers", "4 layers")),
        ({"num_local_experts": 16}, ("[16, 128]",)),
        ({"use_cache": "no", "initializer_range": "small"}, ("initializer_range", "got str")),
        ({"id2label": 5}, ("id2label", "Errors:")),
        ({"to_dict": 3}, ("to_dict",)),
    ],
    ids=str,
)
def test_a_config_of_other_weights_is_refused(base, changes, words):
    change_config(base, **changes)
    with pytest.raises(StageError) as caught:
        open_base(base)
    assert all(word in caught.value.found + caught.value.expected + caught.value.what
               for word in words), caught.value  # fmt: skip
    assert "\n" not in caught.value.found


@pytest.mark.parametrize(
    "text", ["[1]", "{", '{"cache_implementation": "x"}', '{"watermarking_config": 5}']
)
def test_a_generation_config_that_transformers_cannot_use_is_refused(base, text):
    (base / "generation_config.json").write_text(text)
    with pytest.raises(StageError, match=r"generation_config\.json"):
        open_base(base)
