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
from sparselong.model import load_model, load_tokenizer
from sparselong.packing import mxfp4
from sparselong.tiny import check_early
from tests.conftest import ROOT
from tests.inputs.base_files import GONE, ROPE, TYPES, change_config


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
    more = (f"model.base={base}", f"data.train={path}", "sequence_len=512")
    one, two = run_script("01_health", *more), run_script("02_compress", *more)
    one.assert_explained("rejects", f"{path}, line 2")
    assert refusal(one.err) == refusal(two.err)
    assert ".health-" not in one.err
    rows[1]["messages"][0]["content"] = "fine too"
    data(rows)
    assert run_script("01_health", *more).code == 0
    assert run_script("02_compress", *more).code == 0


def test_stages_01_and_02_refuse_calls_before_the_small_model_is_trained(
    data, tmp_path, run_script
):
    """Its template, which writes no tools, is known before."""
    answer = {"role": "assistant", "content": "yes " * 99}
    rows = [{"messages": [{"role": "user", "content": "a"}, answer]} for _ in range(3)]
    path = data([*rows, {**rows[0], "tools": [{"type": "function", "function": {"name": "f"}}]}])
    more = (f"data.train={path}", "evaluation.tasks=[demo_hellaswag]", "model.base=tiny")
    one, two = run_script("01_health", *more), run_script("02_compress", *more)
    one.assert_explained(f"{path}, line 4 sets `tools`", "run/base does not")
    assert (one.code, refusal(one.err)) == (two.code, refusal(two.err))
    assert "small model" not in two.err and not (tmp_path / "run/base").exists()
    assert not (tmp_path / "run/data/source.json").exists()  # the row may be corrected


def test_01_says_what_it_cannot_check_yet(run_script, tmp_path):
    done = run_script("01_health", "model.base=tiny", "evaluation.tasks=[demo_hellaswag]")
    assert done.code == 0
    rows = {row["check"]: row for row in json.loads((tmp_path / "run/01_health/report.json")
            .read_text())["rows"]}  # fmt: skip
    assert rows["base checkpoint"]["found"].startswith("not checked")
    assert "tokenizer" not in rows and "can be encoded" in rows["conversations"]["found"]


def test_01_leaves_no_rows_behind(run_script, tmp_path):
    assert run_script("01_health", "evaluation.tasks=[demo_hellaswag]").code == 0
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        *(".lock", "01_health", "config.yaml", "report.html"),
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
