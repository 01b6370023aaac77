"""Types, blocks and keys of a GGUF file, without a run."""

import hashlib
import io
import json
import shutil
import sys

import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GptOssConfig

from sparselong.errors import StageError
from sparselong.export.gguf import encoding, metadata, reading, types
from sparselong.model import load_tokenizer


def test_more_rows_than_are_packed_at_once_and_every_byte(monkeypatch):
    monkeypatch.setattr(encoding, "_PACKED_ROWS", 7)
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 1, 16).repeat(2, 3, 1)
    blocks[16:] = blocks[16:].flip(-1)
    scales = torch.arange(96, dtype=torch.uint8).view(32, 3)
    packed = encoding.pack_blocks(blocks, scales).view(32, 3, 17)
    elements = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    assert torch.equal(packed[..., 0], scales)
    assert torch.equal(packed[..., 1:], elements[..., :16] | (elements[..., 16:] << 4))


@pytest.mark.parametrize("size", [1e-9, 1e-7, 3e-6, 1e-4, 1.0, 300.0, 1e6])
def test_q8_0_is_within_half_a_step_at_every_size(size):
    torch.manual_seed(1)
    values = (torch.randn(64, 96) * size).bfloat16()
    values[3] = 0
    values[4, 1:32] = 0
    rows = encoding.encode(values, "Q8_0", "a weight")
    decoded = torch.from_numpy(gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0))
    step = rows.view(64, -1, 34)[..., :2].contiguous().view(torch.float16).double()
    error = (decoded.double() - values.double()).abs().view(64, -1, 32)
    least = 2.0**-25  # half of f16's smallest step
    assert (error <= (step / 2).clamp_min(least)).all()


@pytest.mark.parametrize("kind", ["Q8_0", "BF16", "MXFP4"])
@pytest.mark.parametrize("is_off", [False, True])
def test_bytes_that_are_as_written_must_decode_to_the_sources_values(kind, is_off):
    """As if a tensor was encoded wrongly in the same way twice."""
    torch.manual_seed(1)
    if kind == "MXFP4":
        blocks = torch.randint(0, 256, (4, 3, 16), dtype=torch.uint8)
        scales = torch.randint(120, 130, (4, 3), dtype=torch.uint8)
        data = encoding.pack_blocks(blocks, scales)
        values = encoding.decode_exactly(blocks, scales).float()
    else:
        values = torch.randn(4, 96).bfloat16().float()
        data = encoding.encode(values.bfloat16(), kind, "a weight")
    if is_off:
        values = values.clone()
        values[2, 40] += values.abs().max() / 64
    part = encoding.Slice(data, lambda count: values[:count])
    file = io.BytesIO(data.numpy().tobytes())
    same = reading._is_same(file, part, reading._Meter(kind), hashlib.sha256())
    assert same is not is_off


@pytest.mark.parametrize(("kind", "value"), [("F16", 70_000.0), ("Q8_0", 1e9)])
def test_a_value_that_overflows_is_refused(kind, value):
    values = torch.zeros(2, 32).bfloat16()
    values[1, 5] = -value
    with pytest.raises(StageError, match=f"lm_head.weight cannot be stored as {kind}"):
        encoding.encode(values, kind, "lm_head.weight")


def test_rows_that_no_k_quant_fits_get_llama_cpps_other_type():
    kinds = {rows: [types.type_for_rows(each, rows) for each in types.DENSE_TYPES]
             for rows in (2880, 4096)}  # fmt: skip
    assert kinds[4096] == ["BF16", "F32", "F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K"]
    assert kinds[2880] == ["BF16", "F32", "F16", "Q8_0", "Q8_0", "Q5_1", "Q5_0"]


@pytest.fixture
def other_llama_cpp(monkeypatch, tmp_path):
    """Write a package llama_cpp whose module with the routines has a text."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "llama_cpp"]:
            del sys.modules[name]

    def write(text: str) -> None:
        package = tmp_path / "llama_cpp"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "_ggml.py").write_text(text)
        forget()
        monkeypatch.syspath_prepend(tmp_path)

    yield write
    forget()


@pytest.mark.parametrize(
    "text", ["raise RuntimeError('no libggml.so')", "import no_such_module", "libggml = object()"]
)
def test_an_installed_llama_cpp_that_cannot_be_loaded_is_refused_by_the_check(
    other_llama_cpp, text
):
    other_llama_cpp(text)
    types.check_dense_type("q8_0")
    with pytest.raises(StageError, match="which write K-quants, cannot be loaded") as caught:
        types.check_dense_type("q4_k")
    assert ".uv/bin/uv pip install --python .venv/bin/python llama-cpp-python" in str(caught.value)


O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""As published in gpt-oss's tokenizer.json."""


@pytest.mark.parametrize(
    ("pattern", "name"),
    [(O200K, "gpt-4o"), (O200K.replace("{1,3}", "{1,2}"), None), (r"\s+|\S+", None)],
)
def test_the_rule_that_splits_text_is_recognized_by_what_it_does(tmp_path, pattern, name):
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    if name:
        assert metadata._split_rule(tmp_path / "tokenizer.json") == name
        return
    with pytest.raises(StageError, match="llama.cpp has no rule for the tokenizer"):
        metadata._split_rule(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.layer_types.reverse(),
        lambda config: config.rope_parameters.update(attention_factor=1.0),
        lambda config: config.rope_parameters.update(mscale=1.0),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(change):
    rope = {"rope_type": "yarn", "rope_theta": 150_000.0, "factor": 32.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "original_max_position_embeddings": 4096}  # fmt: skip
    config = GptOssConfig(num_hidden_layers=4, rope_parameters=rope)
    metadata._check(config)
    change(config)
    with pytest.raises(StageError, match="cannot compute this model"):
        metadata._check(config)


@pytest.mark.parametrize("place", ["file", "file and config", "named ones"])
def test_the_chat_template_is_the_one_that_training_used(untrained_base, tmp_path, place):
    """The gguf package takes the config's before the file's, and the first of several."""
    folder = shutil.copytree(untrained_base, tmp_path / "model")
    wanted = load_tokenizer(folder).chat_template
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    if place == "file and config":
        path.write_text(json.dumps({**config, "chat_template": f"{wanted}older"}))
    elif place == "named ones":
        (folder / "chat_template.jinja").unlink()
        named = {"tool_use": f"{wanted}of tools", "default": wanted}
        rows = [{"name": name, "template": text} for name, text in named.items()]
        path.write_text(json.dumps({**config, "chat_template": rows}))
    architecture = GptOssConfig(**json.loads((folder / "config.json").read_text()))
    writer = gguf.GGUFWriter(None, metadata.ARCHITECTURE)
    metadata.add_keys(writer, architecture, folder, "a model")
    found = {key: one.value for key, one in writer.kv_data[0].items() if "chat_template" in key}
    assert found == {"tokenizer.chat_template": wanted}
