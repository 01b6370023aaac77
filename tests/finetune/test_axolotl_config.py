"""The generated YAML: what must be said explicitly, and what is refused."""

from pathlib import Path

import pytest

from sparselong.config.schema import load
from sparselong.errors import StageError
from sparselong.finetune.axolotl_config import (
    PLUGIN,
    Folders,
    build,
    check_heads,
    refuse_unsupported,
)
from tests.conftest import ROOT

FOLDERS = Folders(
    Path("/run/02"), Path("/run/03"), Path("/d/train.jsonl"), Path("/d/val.jsonl"), "tiny-w4a16"
)


def document(*overrides: str, **arguments) -> dict:
    config = load(ROOT / "configs/tiny.yaml", list(overrides))
    return build(config, FOLDERS, arguments.pop("resume_from", None), 100, **arguments)


def test_precision_and_kernels_are_never_left_to_axolotl():
    made = document()
    assert made["fp16"] is False and made["tf32"] is False
    assert isinstance(made["bf16"], bool)
    assert [made[f"lora_{part}_kernel"] for part in ("qkv", "o", "mlp")] == [False] * 3
    assert "context_parallel_size" not in made
    assert made["eval_sample_packing"] is False
    # Beside packing Axolotl would drop the last, incomplete batch of every evaluation.
    assert made["dataloader_drop_last"] is False


def test_paths_and_sections():
    made = document()
    assert made["base_model"] == "/run/02/model"
    assert made["plugins"] == [PLUGIN]
    assert made["output_dir"] == "/run/03/checkpoints"
    assert made["sparselong"]["masters"] == "/run/02/masters"
    assert made["sparselong"]["criterion"] == "hysteresis"
    assert made["sparselong"]["name"] == "tiny-w4a16"
    data = made["datasets"][0]
    assert (data["path"], data["type"], data["roles_to_train"]) == (
        "/d/train.jsonl",
        "chat_template",
        ["assistant"],
    )
    assert made["test_datasets"][0]["path"] == "/d/val.jsonl"
    assert made["load_best_model_at_end"] and made["metric_for_best_model"] == "eval_loss"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("lora.r=8", "lora_r", 8),
        ("training.max_steps=7", "max_steps", 7),
        ("training.optimizer=adamw_torch_fused", "optimizer", "adamw_torch_fused"),
        ("training.lr_scheduler=constant", "lr_scheduler", "constant"),
        ("training.early_stopping_patience=2", "early_stopping_patience", 2),
        ("training.save_total_limit=5", "save_total_limit", 5),
        ("training.sample_packing=false", "sample_packing", False),
        ("training.use_tensorboard=true", "use_tensorboard", True),
        ("training.wandb_project=trial", "wandb_project", "trial"),
        ("seed=7", "seed", 7),
        ("sequence_len=512", "sequence_len", 512),
        ("micro_batch_size=3", "micro_batch_size", 3),
    ],
)
def test_keys_arrive(override, key, value):
    assert document(override)[key] == value


def test_the_plugin_is_told_what_cannot_be_kept():
    """The tiny config has no checkpointing, on a GPU as on a CPU."""
    told = document()["sparselong"]["nothing_to_keep"]
    assert set(told) == {"keep_attention", "keep_experts"}
    assert all("gradient_checkpointing" in why for why in told.values())


def test_nothing_is_null_and_resume_is_named():
    assert None not in document("training.early_stopping_patience=null").values()
    assert "resume_from_checkpoint" not in document()
    made = document(resume_from=Path("/run/03/checkpoints/checkpoint-4"), bake_only=True)
    assert made["resume_from_checkpoint"].endswith("checkpoint-4")
    assert made["sparselong"]["bake_only"] is True


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("flash_attention=true", "flash_attention=false"),
        ("training.optimizer=adamw_bnb_8bit", "training.optimizer=adamw_torch"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(override, fix):
    config = load(ROOT / "configs/tiny.yaml", [override])
    with pytest.raises(StageError) as refusal:
        refuse_unsupported(config, gpus=0)
    assert fix in refusal.value.fix


def test_a_gpu_takes_what_needs_one():
    overrides = ["flash_attention=true", "training.optimizer=adamw_bnb_8bit"]
    refuse_unsupported(load(ROOT / "configs/tiny.yaml", overrides), gpus=1)


def test_each_process_needs_a_gpu_of_its_own_where_there_are_any():
    config = load(ROOT / "configs/tiny.yaml", ["sequence_parallel_degree=4"])
    refuse_unsupported(config, gpus=0, processes=4)
    refuse_unsupported(config, gpus=4, processes=4)
    with pytest.raises(StageError, match="4 visible GPUs") as refusal:
        refuse_unsupported(config, gpus=3, processes=4)
    assert "sequence_parallel_degree=3" in refusal.value.fix


def test_a_split_sequence_attends_through_our_function_and_axolotl_splits_nothing():
    made = document("sequence_parallel_degree=4", "heads_k_stride=2")
    assert made["sparselong"]["attention"] == "sparselong"
    assert made["sparselong"]["heads_k_stride"] == 2
    assert document()["sparselong"]["attention"] == "eager"
    assert not {"context_parallel_size", "sequence_parallel_degree"} & set(made)


def test_a_stride_that_does_not_divide_the_heads_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"num_key_value_heads": 2}')
    split = ["sequence_parallel_degree=2", "heads_k_stride=4"]
    check_heads(load(ROOT / "configs/tiny.yaml", [split[0]]), tmp_path)
    check_heads(load(ROOT / "configs/tiny.yaml", [split[1]]), tmp_path)  # nothing is gathered
    with pytest.raises(StageError, match="2 key/value heads"):
        check_heads(load(ROOT / "configs/tiny.yaml", split), tmp_path)
