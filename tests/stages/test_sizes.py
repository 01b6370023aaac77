"""Sizes by the table of what stage 02 stores: against the planner, and against written files."""

import json

import pytest
from transformers import GptOssConfig

from benchmarks.report import sizes
from sparselong import memory
from sparselong.checkpoint import Checkpoint, read_header
from sparselong.compress import stream
from sparselong.compress.report import MASTERS, measure_sizes, predict
from sparselong.config import load
from sparselong.memory import storage
from sparselong.model import SparseLongConfig
from tests.conftest import ROOT
from tests.stages.conftest import run


def plan(model: str, dense: tuple[int, str, int], sparsity: str, share: int) -> tuple[int, int]:
    """The planner's bytes of the model and of the masters."""
    shape = memory.PUBLISHED[model]
    overrides = [f"model.base={model}", f"experts.sparsity={sparsity}"]
    names = ("weight_bits", "sparsity", "group_size")
    overrides += [f"shared_dense.{k}={v}" for k, v in zip(names, dense, strict=True)]
    if share > 1:
        overrides.append(f"experts.keep={shape.experts // share}")
    config = load(ROOT / "configs/gpt-oss-20b-1x3090.yaml", overrides)
    disk = storage.disk_bytes(shape, config)
    return disk["compressed_model"], disk["compressed_masters"]


@pytest.mark.parametrize("dense", sizes.dense_forms())
def test_every_combination_is_what_the_planner_says(dense):
    for model in memory.PUBLISHED:
        for sparsity in sizes.expert_forms():
            for share in (1, 2):
                found = sizes.size(model, dense, sparsity, share)
                masters = found.bytes.get(MASTERS, 0)
                assert (found.model_bytes, masters) == plan(model, dense, sparsity, share)


def test_forms_are_all_that_the_config_allows():
    assert len(sizes.dense_forms()) == 10 and set(sizes.expert_forms()) == {"none", "2:4"}
    found = sizes.size("openai/gpt-oss-120b", (4, "2:4", 64), "2:4")
    bits = {group: round(each, 1) for group, each in found.bits_per_weight.items()}
    assert bits == {
        **{"attention": 3.0, "experts": 3.0, "embedding": 16.0, "lm_head": 16.0},
        **{"router_and_norms": 16.0, "masters": 16.0},
    }
    half = sizes.size("openai/gpt-oss-120b", (16, "none", 64), "none", share=2)
    assert f"{half.model_bytes / 1e9:.1f}" == "34.7" and MASTERS not in half.bytes


def test_written_files_have_the_predicted_bytes(compressed_run):
    folder = compressed_run / "02_compress"
    model, masters = Checkpoint(folder / "model"), folder / "masters"
    document = dict(model.config)
    quantization = SparseLongConfig(**document.pop("quantization_config"))
    found = predict(GptOssConfig(**document), quantization)
    assert measure_sizes(model, masters) == found
    on_disk = sum(path.stat().st_size for path in masters.glob("*.safetensors"))
    headers = sum(
        min(record.begin for record in read_header(path).values())
        for path in masters.glob("*.safetensors")
    )
    assert found.bytes[MASTERS] == on_disk - headers
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    assert metrics["bits_per_weight"] == found.bits_per_weight
    assert metrics["bytes_on_disk"] == found.model_bytes


def test_stage_02_refuses_to_finish_what_the_table_does_not_have(
    small_arguments, tmp_path, capsys, monkeypatch
):
    table, name = stream.stored_tensors, "model.layers.3.self_attn.o_proj.bias"
    plain = ["shared_dense.weight_bits=16", "shared_dense.sparsity=none"]

    def other(*given):
        return {**table(*given), name: ("BF16", (64,))}

    monkeypatch.setattr(stream, "stored_tensors", other)
    assert run(tmp_path / "run", [*small_arguments, *plain]) == 1
    assert name in capsys.readouterr().err
    assert not (tmp_path / "run/02_compress/model").exists()
