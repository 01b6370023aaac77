"""Stage 01 says what stage 02 will say: about config.json, headers, tokenizer files and rows."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from sparselong.config import load
from sparselong.errors import StageError
from sparselong.memory.base_config import read_base_config
from sparselong.memory.shape import find_shape, read_shape
from sparselong.model import load_model, load_tokenizer
from sparselong.packing import mxfp4
from sparselong.tiny import check_early, open_base
from tests.conftest import ROOT

ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
GONE = object()
TYPES = ["sliding_attention", "full_attention"] * 2
SIZES = (
    *("num_hidden_layers", "num_local_experts", "hidden_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "num_experts_per_tok"),
    *("vocab_size", "sliding_window"),
)


def change_config(base: Path, **changes) -> Path:
    """Change keys of a base's config.json; GONE removes one. Return the file's path."""
    path = base / "config.json"
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not GONE}))
    return path


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


# The same four lines from 01 and 02


def first_shard(base: Path, name: str) -> Path:
    index = json.loads((base / "model.safetensors.index.json").read_text())
    return base / index["weight_map"][name]


def dequantize_experts(base: Path) -> None:
    """Store the experts in bf16, as a model that was dequantized and saved."""
    index = json.loads((base / "model.safetensors.index.json").read_text())
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(base / file)
        for name in [name for name in tensors if name.endswith("_blocks")]:
            scales = tensors.pop(f"{name.removesuffix('blocks')}scales")
            values = mxfp4.decode(tensors.pop(name), scales)
            tensors[name.removesuffix("_blocks")] = values.to(torch.bfloat16)
        save_file(tensors, base / file, metadata={"format": "pt"})
        kept = {n: f for n, f in index["weight_map"].items() if f != file}
        index["weight_map"] = kept | dict.fromkeys(tensors, file)
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def dequantize_without_saying(base: Path) -> None:
    dequantize_experts(base)
    change_config(base, quantization_config=GONE)


def give_a_layer_fewer_experts(base: Path) -> None:
    name = "model.layers.1.mlp.experts.down_proj_bias"
    path = first_shard(base, name)
    tensors = load_file(path)
    tensors[name] = tensors[name][:7].clone()
    save_file(tensors, path, metadata={"format": "pt"})


def cut_tokenizer(base: Path) -> None:
    path = base / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:5000])


def point_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")


def drop_merges(base: Path) -> None:
    document = json.loads((base / "tokenizer.json").read_text())
    del document["model"]["merges"]
    (base / "tokenizer.json").write_text(json.dumps(document))


def add_token(base: Path) -> None:
    document = json.loads((base / "tokenizer.json").read_text())
    token = {**document["added_tokens"][-1], "id": 2048, "content": "<|extra|>"}
    document["added_tokens"].append(token)
    (base / "tokenizer.json").write_text(json.dumps(document))


def leave_a_shard_over(base: Path) -> None:
    shutil.copy(sorted(base.glob("model-*"))[0], base / "model-00005-of-00005.safetensors")


FAULTS: list[tuple[Callable[[Path], object], tuple[str, ...]]] = [
    (dequantize_experts, ("experts are dequantized", "BF16")),
    (dequantize_without_saying, ("quant_method None",)),
    (give_a_layer_fewer_experts, ("model.layers.1.mlp.experts.down_proj_bias", "BF16 [7, 128]")),
    (cut_tokenizer, ("tokenizer.json",)),
    (point_tokenizer, ("tokenizer.json", "git lfs pull")),
    (drop_merges, ("0 merges", "1783 merges")),
    (add_token, ("2049 tokens", "2048 rows", "<|extra|>")),
    (leave_a_shard_over, ("model-00005-of-00005.safetensors",)),
    (lambda base: change_config(base, num_experts_per_tok=9), ("num_experts_per_tok: 9",)),
    (lambda base: change_config(base, num_experts=16), ("num_experts: 16",)),
    (lambda base: change_config(base, layer_types=TYPES * 2), ("a list of 8",)),
    (lambda base: (base / "config.json").unlink(), ("config.json", "No such file")),
]


def refusal(text: str) -> str:
    return text[text.rindex("error:    ") :]


@pytest.mark.parametrize(("damage", "words"), FAULTS, ids=[f.__name__ for f, _ in FAULTS])
def test_stages_01_and_02_refuse_a_base_in_the_same_words(base, run_script, damage, words):
    damage(base)
    more = (f"model.base={base}", "evaluation.tasks=[demo_hellaswag]")
    one, two = run_script("01_health", *more), run_script("02_compress", *more)
    one.assert_explained(*words)
    assert (one.code, refusal(one.err)) == (two.code, refusal(two.err))


BAD_ROWS = {
    "not JSON": "{\n",
    "no assistant": '{"messages": [{"role": "user", "content": "x"}]}\n',
    "not text": b"\xff\xfe\n",
    "empty": "",
}


@pytest.mark.parametrize("text", BAD_ROWS.values(), ids=BAD_ROWS)
def test_stages_01_and_02_refuse_rows_in_the_same_words(tmp_path, run_script, text):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    more = (f"data.train={path}", "evaluation.tasks=[demo_hellaswag]")
    one, two = run_script("01_health", *more), run_script("02_compress", *more)
    one.assert_explained("rows.jsonl")
    assert (one.code, refusal(one.err)) == (two.code, refusal(two.err))
    assert not (tmp_path / "run/data/source.json").exists()


def test_a_row_that_cannot_be_rendered_may_be_corrected(base, data, tmp_path, run_script):
    """Both stages refuse it, and neither insists on the rows that it has refused."""
    template = (base / "chat_template.jinja").read_text()
    check = "{% if 'forbidden' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
    (base / "chat_template.jinja").write_text(check + template)
    said = ["fine", "forbidden", "also fine"]
    rows = [
        {
            "messages": [
                {"role": "user", "content": t},
                {"role": "assistant", "content": "yes " * 99},
            ]
        }
        for t in said
    ]
    path = data(rows)
    more = (f"model.base={base}", f"data.train={path}", "evaluation.tasks=[demo_hellaswag]")
    one, two = run_script("01_health", *more), run_script("02_compress", *more)
    one.assert_explained("rejects a row")
    assert refusal(one.err) == refusal(two.err)
    assert ".health-" not in one.err
    rows[1]["messages"][0]["content"] = "fine too"
    data(rows)
    assert run_script("01_health", *more).code == 0
    assert run_script("02_compress", *more).code == 0


def test_01_says_what_it_cannot_check_yet(run_script, tmp_path):
    done = run_script("01_health", "model.base=tiny", "evaluation.tasks=[demo_hellaswag]")
    assert done.code == 0
    rows = {row["check"]: row for row in json.loads((tmp_path / "run/01_health/report.json")
            .read_text())["rows"]}  # fmt: skip
    assert rows["base checkpoint"]["found"].startswith("not checked")
    assert "tokenizer" not in rows and "not encoded" in rows["conversations"]["found"]


def test_01_leaves_no_rows_behind(run_script, tmp_path):
    assert run_script("01_health", "evaluation.tasks=[demo_hellaswag]").code == 0
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        *(".lock", "01_health", "config.yaml"),
    ]


def test_refusals_do_not_wait_for_torch(base, chat_file, tmp_path):
    """What check_early finds needs neither torch nor transformers."""
    drop_merges(base)
    code = (
        "import sys; from pathlib import Path\n"
        "from sparselong.config import load\n"
        "from sparselong.errors import StageError\n"
        "from sparselong.tiny import check_early\n"
        f"config = load('configs/tiny.yaml', ['model.base={base}', 'data.train={chat_file}'])\n"
        "try:\n"
        f"    check_early(config, Path('{tmp_path}'))\n"
        "except StageError as error:\n"
        "    heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "    sys.exit(bool(heavy) or 'merges' not in str(error))\n"
        "sys.exit(2)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_other_spellings_run_through_stage_02(base, run_script, tmp_path):
    """The published files' older spelling, and named templates, give the same model and text."""
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = [
        {"name": "tool_use", "template": "wrong"},
        {"name": "default", "template": template},
    ]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    change_config(
        base,
        **{"num_local_experts": GONE, "num_experts": 8, "rope_parameters": GONE},
        **{"rope_scaling": ROPE, "rope_theta": 150000},
    )
    done = run_script("02_compress", f"model.base={base}", "evaluation.tasks=[demo_hellaswag]")
    assert done.code == 0, done.err
    model = tmp_path / "run/02_compress/model"
    assert load_model(model).config.num_local_experts == 8
    assert AutoTokenizer.from_pretrained(model).chat_template == template
    assert load_tokenizer(model).chat_template == load_tokenizer(base).chat_template == template


def test_check_early_prepares_the_rows(untrained_base, chat_file, tmp_path):
    overrides = [f"model.base={untrained_base}", f"data.train={chat_file}"]
    check_early(load(ROOT / "configs/tiny.yaml", overrides), tmp_path)
    assert (tmp_path / "data/source.json").exists()
