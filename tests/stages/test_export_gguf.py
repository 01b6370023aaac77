"""gguf and ollama: tensors as the gguf package reads them, keys, interruption, bad input."""

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import base_checkpoint
from sparselong.config import load
from sparselong.export.gguf import GgufFormat, file, reading
from sparselong.export.source import Source
from sparselong.run import Stage
from tests.conftest import ROOT
from tests.stages.test_export import export, manifest_of
from tests.stages.trained import CPU, Trained

PARTS = ("gguf", "ollama")


def copy_run(trained: Trained, folder: Path) -> Trained:
    """Return the run in another directory, without exports."""
    ignored = shutil.ignore_patterns("05_export")
    shutil.copytree(trained.run_dir, folder, symlinks=True, ignore=ignored)
    return trained._replace(run_dir=folder)


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory) -> Trained:
    found = copy_run(trained_run, tmp_path_factory.mktemp("gguf") / "Größe (1)")
    assert export(found, "--to", *PARTS) == 0
    return found


@pytest.fixture
def copied(trained_run, tmp_path) -> Trained:
    return copy_run(trained_run, tmp_path / "run")


def file_of(trained: Trained, part: str = "gguf") -> Path:
    return trained.run_dir / "05_export" / part / "model.gguf"


def source_of(trained: Trained) -> Source:
    return Source(trained.run_dir / "03_finetune/model", CPU)


def wanted_tensors(source: Source) -> dict[str, torch.Tensor]:
    """Return the values of all tensors in fp32 by their names in a file of llama.cpp."""
    found = {}
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.router": "ffn_gate_inp",
    }
    for name in source.shapes:
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        prefix, inner = (f"blk.{layer[1]}.", layer[2]) if layer else ("", name)
        module, _, last = inner.rpartition(".")
        if inner == "self_attn.sinks":
            found[f"{prefix}attn_sinks.weight"] = torch.cat([*source.parts(name)]).float()
        elif module in names:
            found[f"{prefix}{names[module]}.{last}"] = torch.cat([*source.parts(name)]).float()
        elif not last.endswith("_scales"):
            stem, _, kind = last.rpartition("_")
            if kind == "bias":
                values = torch.cat([*source.parts(name)]).float()
            else:
                stack = source.decoded_experts(name.removesuffix("_blocks"))
                values = torch.cat([*stack]).float().transpose(1, 2)
            kind = "weight" if kind == "blocks" else kind
            if stem == "down_proj":
                found[f"{prefix}ffn_down_exps.{kind}"] = values
            else:
                found[f"{prefix}ffn_gate_exps.{kind}"] = values[:, 0::2]
                found[f"{prefix}ffn_up_exps.{kind}"] = values[:, 1::2]
    return found


def read_tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def decode(tensor: gguf.ReaderTensor) -> torch.Tensor:
    shape = [int(size) for size in reversed(tensor.shape)]
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).view(shape)


def test_the_packages_reader_decodes_every_tensor_to_the_sources_values(exported):
    wanted, found = wanted_tensors(source_of(exported)), read_tensors(file_of(exported))
    assert found.keys() == wanted.keys() and len(found) == 3 + 19 * 4
    for name, values in wanted.items():
        decoded = decode(found[name])
        if not name.endswith("_exps.weight"):  # llama.cpp decodes the code of -0 to 0
            decoded, values = decoded.view(torch.int32), values.contiguous().view(torch.int32)
        assert torch.equal(decoded, values), name
    kinds = {name: tensor.tensor_type.name for name, tensor in found.items()}
    recorded = manifest_of(exported.run_dir, "gguf")["metrics"]["tensor_types"]
    assert kinds == {name: kind for kind, names in recorded.items() for name in names}
    one_layer = [kind for name, kind in kinds.items() if name.startswith("blk.1.")]
    assert {kind: one_layer.count(kind) for kind in set(one_layer)} == {
        **{"MXFP4": 3, "BF16": 4, "F32": 12}
    }
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "BF16"


def test_the_experts_bytes_are_the_sources_in_another_order(exported):
    """Nibble by nibble: element j and j + 16 of a byte in the file, 2j and 2j + 1 in the source."""
    source, found = source_of(exported), read_tensors(file_of(exported))
    name = "model.layers.2.mlp.experts.gate_up_proj"
    blocks, scales = (torch.cat([*source.parts(f"{name}_{p}")]) for p in ("blocks", "scales"))
    for stem, rows in (("gate", slice(0, None, 2)), ("up", slice(1, None, 2))):
        packed = found[f"blk.2.ffn_{stem}_exps.weight"].data
        packed = np.asarray(packed).reshape(*scales[:, rows].shape, 17)
        assert np.array_equal(packed[..., 0], scales[:, rows].numpy())
        nibbles = np.concatenate((packed[..., 1:] & 15, packed[..., 1:] >> 4), axis=-1)
        published = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
        assert np.array_equal(published, blocks[:, rows].numpy())


def test_keys_are_those_of_gpt_oss(exported):
    fields = gguf.GGUFReader(file_of(exported)).fields
    found = {key: field.contents() for key, field in fields.items()}
    config = json.loads((exported.run_dir / "03_finetune/model/config.json").read_text())
    rope = config["rope_parameters"]
    wanted = {
        "general.architecture": "gpt-oss",
        "gpt-oss.block_count": 4,
        "gpt-oss.context_length": config["max_position_embeddings"],
        "gpt-oss.embedding_length": 128,
        "gpt-oss.feed_forward_length": 128,
        "gpt-oss.expert_feed_forward_length": 128,
        "gpt-oss.attention.head_count": 4,
        "gpt-oss.attention.head_count_kv": 2,
        "gpt-oss.attention.key_length": 64,
        "gpt-oss.attention.value_length": 64,
        "gpt-oss.attention.sliding_window": config["sliding_window"],
        "gpt-oss.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "gpt-oss.rope.freq_base": 150_000.0,
        "gpt-oss.rope.scaling.type": "yarn",
        "gpt-oss.rope.scaling.factor": rope["factor"],
        "gpt-oss.rope.scaling.original_context_length": 4096,
        "gpt-oss.rope.scaling.yarn_beta_fast": rope["beta_fast"],
        "gpt-oss.rope.scaling.yarn_beta_slow": rope["beta_slow"],
        "gpt-oss.expert_count": 8,
        "gpt-oss.expert_used_count": 4,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
    }
    assert {key: found.get(key) for key in wanted} == wanted
    folder = exported.run_dir / "03_finetune/model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = found["tokenizer.ggml.tokens"]
    assert tokens == tokenizer.convert_ids_to_tokens(range(config["vocab_size"]))
    control = [i for i, k in enumerate(found["tokenizer.ggml.token_type"]) if k == 3]
    assert control == sorted(tokenizer.added_tokens_decoder)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]
    assert found["tokenizer.chat_template"] == (folder / "chat_template.jinja").read_text()


def test_manifests_have_the_documented_metrics(exported):
    for part in PARTS:
        manifest = manifest_of(exported.run_dir, part)
        metrics = manifest["metrics"]
        assert metrics["reloaded"] is metrics["tensors_identical"] is True
        assert "errors" not in metrics and metrics["tensors"] == 79
        assert manifest["options"] == {"from": "finetuned", "dense-type": "bf16"}
        assert set(metrics["expert_merge_error"]["model.layers.3.mlp.experts"]) == {
            *("gate_up_proj", "down_proj")
        }
    names = {Path(row["path"]).name for row in manifest_of(exported.run_dir, "ollama")["outputs"]}
    assert names == {"Modelfile", "model.gguf"}


def test_ollama_has_the_same_file_once_and_a_template_of_harmony(exported):
    assert os.path.samefile(file_of(exported, "gguf"), file_of(exported, "ollama"))
    text = (file_of(exported, "ollama").parent / "Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\n")
    template = text.split('"""')[1]
    assert "<|start|>" in template and "<|end|>" in template
    opened = re.findall(r"{{-? (if|range|end)\b", template)
    assert opened.count("end") == opened.count("if") + opened.count("range")
    parameters = dict(re.findall(r"^PARAMETER (\w+) (\S+)$", text, re.MULTILINE))
    assert parameters == {"num_ctx": "256", "temperature": "1.0", "top_p": "1.0", "top_k": "0"}
    log = (file_of(exported, "ollama").parent / "log.txt").read_text()
    assert "ollama create gpt-oss-gr-e-1 -f '" in log and "Größe (1)/05_export/ollama/Model" in log


def test_f32_is_exact(copied):
    assert export(copied, "--to", "gguf", "--dense-type", "f32") == 0
    found, wanted = read_tensors(file_of(copied)), wanted_tensors(source_of(copied))
    assert {tensor.tensor_type.name for tensor in found.values()} == {"F32", "MXFP4"}
    assert all(torch.equal(decode(found[name]), values) for name, values in wanted.items())


def test_errors_of_f16_and_q8_0_are_measured(copied, capsys):
    wanted = wanted_tensors(source_of(copied))
    for kind in ("f16", "q8_0"):
        assert export(copied, "--to", "gguf", "--dense-type", kind, "--force") == 0
        found = read_tensors(file_of(copied))
        metrics = manifest_of(copied.run_dir, "gguf")["metrics"]
        assert metrics["tensors_identical"] is False
        typed = {n for n, t in found.items() if t.tensor_type.name == kind.upper()}
        assert typed == metrics["errors"].keys() and len(typed) == 2 + 4 * 4
        assert "18 tensors rounded as asked (relative RMS up to 0." in capsys.readouterr().err
        for name, tensor in found.items():
            decoded, values = decode(tensor).double(), wanted[name].double()
            if name not in typed:
                assert torch.equal(decoded, values)
                continue
            error, measured = (decoded - values).abs(), metrics["errors"][name]
            assert measured["largest"] == float(error.max())
            assert measured["relative_rms"] == pytest.approx(float(error.norm() / values.norm()))
            if kind == "q8_0":
                step = np.asarray(tensor.data).reshape(-1, 34)[:, :2].copy().view(np.float16)
                steps = error.view(-1, 32) / torch.from_numpy(step).double()
                assert 0.4 < float(steps.max()) <= 0.5000001


def test_an_overflow_is_found_before_anything_is_written(copied, monkeypatch, capsys):
    real = Source.parts

    def parts(self, name, step=None):
        for part in real(self, name, step):
            yield part * 1e7 if name == "lm_head.weight" else part

    monkeypatch.setattr(Source, "parts", parts)
    monkeypatch.setattr(file, "write_file", lambda *_: pytest.fail("written"))
    assert export(copied, "--to", "gguf", "--dense-type", "f16") == 1
    told = capsys.readouterr().err
    assert "lm_head.weight cannot be stored as F16" in told and "--dense-type bf16" in told


def test_a_full_disk_leaves_nothing_and_the_same_command_succeeds(
    copied, exported, monkeypatch, capsys
):
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(file.os, "fsync", fsync)
        assert export(copied, "--to", "gguf") == 1
    assert "free disk space" in capsys.readouterr().err
    assert not list(file_of(copied).parent.glob("model.gguf*"))
    usage = shutil.disk_usage(copied.run_dir)._replace(free=2_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        assert export(copied, "--to", "gguf") == 1
    assert "too little space for gguf" in capsys.readouterr().err
    assert export(copied, "--to", "gguf") == 0
    assert file_of(copied).read_bytes() == file_of(exported).read_bytes()


def test_an_interrupted_file_is_continued_after_its_last_whole_tensor(
    copied, exported, monkeypatch, capsys
):
    real, written = file.encoded_parts, []

    def parts(source, tensor):
        written.append(tensor.name)
        for number, part in enumerate(real(source, tensor)):
            if number == 3 and written.count("blk.1.ffn_up_exps.weight") == 1:
                raise KeyboardInterrupt
            yield part

    with monkeypatch.context() as patch:
        patch.setattr(file, "encoded_parts", parts)
        assert export(copied, "--to", "gguf") == 1
        before = len(written)
        assert written[-1] == "blk.1.ffn_up_exps.weight"
        assert export(copied, "--to", "gguf") == 0
    assert written[before - 1] == written[before] and len(written) == 79 + 1
    assert "tensors are kept" in capsys.readouterr().err
    assert file_of(copied).read_bytes() == file_of(exported).read_bytes()


def test_a_partial_file_of_something_else_is_not_continued(copied, exported):
    partial = file_of(copied).with_name("model.gguf.partial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "write_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert export(copied, "--to", "gguf") == 1
    content = bytearray(file_of(exported).read_bytes())
    content[200] ^= 1
    partial.write_bytes(content)
    assert export(copied, "--to", "gguf") == 0
    assert file_of(copied).read_bytes() == file_of(exported).read_bytes()


@pytest.mark.parametrize("place", [100, 50_000, 400_000, -1000])
def test_what_the_disk_returns_is_compared_with_the_source(copied, monkeypatch, capsys, place):
    real = file.write_file

    def flip(stage, path, source, layout):
        real(stage, path, source, layout)
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(file, "write_file", flip)
    assert export(copied, "--to", "gguf") == 1
    assert "does not read as it was written" in capsys.readouterr().err
    assert not list(file_of(copied).parent.glob("model.gguf*"))


def test_another_exports_file_is_neither_replaced_nor_linked(copied, capsys):
    assert export(copied, "--to", "gguf") == 0
    assert export(copied, "--to", "gguf", "--dense-type", "q8_0") == 1
    told = capsys.readouterr().err
    assert "expected: --to gguf --from finetuned --dense-type q8_0" in told
    assert "found:    --to gguf --from finetuned --dense-type bf16" in told
    assert export(copied, "--to", "ollama", "--dense-type", "q8_0") == 0
    kinds = {one.tensor_type.name for one in read_tensors(file_of(copied, "ollama")).values()}
    assert kinds == {"F32", "Q8_0", "MXFP4"}
    (file_of(copied).parent / "notes.txt").write_text("a person's")
    assert export(copied, "--to", "gguf", "--dense-type", "q8_0", "--force") == 0
    assert os.path.samefile(file_of(copied, "gguf"), file_of(copied, "ollama"))
    kept = copied.run_dir / "05_export/gguf.kept-1"
    assert [path.name for path in kept.iterdir()] == ["notes.txt"]


def test_a_linked_file_that_was_edited_is_neither_taken_over_nor_written_to(copied, exported):
    assert export(copied, "--to", "gguf") == 0
    content = file_of(copied).read_bytes()
    edited = content[:-1] + bytes([content[-1] ^ 1])
    file_of(copied).write_bytes(edited)
    assert export(copied, "--to", "ollama") == 0
    assert file_of(copied, "ollama").read_bytes() == content
    assert file_of(copied).read_bytes() == edited
    shutil.rmtree(file_of(copied, "ollama").parent)
    with pytest.MonkeyPatch.context() as patch:  # interrupted while the unfinished file is a link
        patch.setattr(GgufFormat, "verify", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert export(copied, "--to", "ollama") == 1
    partial = file_of(copied, "ollama").with_name("model.gguf.partial")
    partial.unlink()
    os.link(file_of(copied), partial)
    assert export(copied, "--to", "ollama") == 0
    assert file_of(copied, "ollama").read_bytes() == content
    assert file_of(copied).read_bytes() == edited


def test_the_plan_has_the_bytes_of_the_file_and_counts_it_once(exported, capsys):
    assert export(exported, "--to", *PARTS, "--dry-run", "--json") == 0
    first, second = json.loads(capsys.readouterr().out)["writes"]
    size = sum(tensor.n_bytes for tensor in read_tensors(file_of(exported)).values())
    assert (first["bytes"], second["bytes"]) == (size, 0)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["gguf", "--dense-type", "q8"], "did you mean --dense-type q8_0?"),
        (["gguf", "--dense-type", "int3"], "there is no such type"),
        (["ollama", "--dense-type", "q4_k"], ".uv/bin/uv pip install --python .venv"),
        (["mxfp4", "--dense-type", "q8_0"], "--dense-type q8_0 has no effect"),
    ],
)
def test_unknown_or_useless_types_are_refused(exported, monkeypatch, capsys, more, words):
    monkeypatch.setattr("sparselong.export.gguf.types.find_spec", lambda _: None)
    assert export(exported, "--to", *more) == 2
    assert words in capsys.readouterr().err


def test_a_layer_of_the_true_widths(tmp_path, monkeypatch):
    """Rows of 2,880 and 4,096, 64 heads; fewer experts and tokens, which no code depends on."""
    few = {**base_checkpoint.WIDTHS["true"], "num_local_experts": 2, "vocab_size": 2080}
    monkeypatch.setitem(base_checkpoint.WIDTHS, "true", few)
    base_checkpoint.write_base(tmp_path / "model", "true", 1, "cpu", lambda _: None)
    document = json.loads((tmp_path / "model/config.json").read_text())
    plain = {"weight_bits": 16, "sparsity": "none", "group_size": 64, "expert_sparsity": "none"}
    document["quantization_config"] = {"quant_method": "sparselong", **plain}
    (tmp_path / "model/config.json").write_text(json.dumps(document))
    source = Source(tmp_path / "model", CPU)
    layout = file.plan_file(source, "bf16", "a layer")
    stage = Stage("05_export", load(ROOT / "configs/tiny.yaml"), tmp_path, part="gguf")
    stage.dir.mkdir(parents=True)
    file.write_file(stage, tmp_path / "model.gguf", source, layout)
    digest, errors = reading.compare_file(tmp_path / "model.gguf", source, layout)
    assert digest == hashlib.sha256((tmp_path / "model.gguf").read_bytes()).hexdigest()
    wanted, found = wanted_tensors(source), read_tensors(tmp_path / "model.gguf")
    assert errors == {} and found.keys() == wanted.keys() and len(found) == 3 + 19
    for name, values in wanted.items():
        assert torch.equal(decode(found[name]), values), name
