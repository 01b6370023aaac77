"""The generated YAML: explicit settings and refused configurations."""

import json
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from sparselong.config.keys import known_keys
from sparselong.config.schema import Config, load
from sparselong.errors import StageError
from sparselong.finetune.axolotl_config import PLUGIN, build, refuse_unsupported
from sparselong.finetune.training_run import RUN_KEY, TrainingRun
from tests.conftest import ROOT

OURS = {
    **dict.fromkeys(("model", "shared_dense", "experts", "calibration"), "stage 02 has done it"),
    "data": "the plugin gives Axolotl the tokens",
    "evaluation": "stage 04's",
    "profile": "a set of other keys' values",
    "finetuning_modifiers": "masks are updated by a callback of ours",
    "attention_backend": "the plugin chooses our kernels",
    "deterministic": "the plugin chooses our kernels",
    "sequence_parallel_degree": "Axolotl trains as if alone, rank.py says otherwise",
    "expert_parallel_degree": "as the degree",
    "heads_k_stride": "as the degree",
    "ring_attn_func": "as the degree",
    "lora.expert_targets": "Axolotl's schema has no expert adapters; the plugin adds them",
    "lora.expert_r": "as expert_targets",
    "lora.expert_dtype": "as expert_targets",
    "lora.router": "as expert_targets",
    "training.keep_attention": "a callback of ours tells layers what to keep",
    "training.keep_experts": "as keep_attention",
    "training.slice_rows": "the same callback replaces the layers' checkpoints",
    "training.offload_checkpoints": "as slice_rows",
    "training.loss_target": "a callback of ours stops training",
    "training.early_stopping_patience": "as loss_target",
    "training.early_stopping_threshold": "as loss_target",
    "training.metrics": "the trainer's own evaluation calls the function",
    "training.use_tensorboard": "a callback of ours tells the trackers",
    "training.wandb_project": "as use_tensorboard",
    "training.trackio_project": "as use_tensorboard",
    "training.save_total_limit": "transformers would remove any name with checkpoint-N in it",
}
"""Keys and sections that are not passed to Axolotl, and why."""
NEEDED = {"flash_attention": {"attention_backend": "auto"}}
"""Other keys that must be set for a key to have an effect."""


def document(*overrides: str, resume_from: Path | None = None) -> dict:
    config = load(ROOT / "configs/tiny.yaml", list(overrides))
    return build(TrainingRun(Path("/runs/a"), config), resume_from)


def leaves() -> list[str]:
    keys = known_keys(Config)
    return [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


def is_ours(key: str) -> bool:
    return key in OURS or key.partition(".")[0] in OURS


def another(key: str, value: Any) -> Any:
    """Return another value of a key's type."""
    section = known_keys(Config)[key]
    annotation = section.model_fields[key.rpartition(".")[2]].annotation
    if get_origin(annotation) is Literal:
        return next(choice for choice in get_args(annotation) if choice != value)
    if isinstance(annotation, types.UnionType):
        annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
        value = None
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return value[:1]
    if isinstance(value, int | float):
        return value * 2 + 1
    return "other" if annotation is str else 7


def change(config: Any, key: str, value: Any) -> Any:
    name, _, rest = key.partition(".")
    inner = change(getattr(config, name), rest, value) if rest else value
    return config.model_copy(update={name: inner})


@pytest.mark.parametrize("key", [key for key in leaves() if not is_ours(key)])
def test_changing_a_key_that_axolotl_must_know_changes_the_document(key):
    config = load(ROOT / "configs/tiny.yaml")
    for beside, value in NEEDED.get(key, {}).items():
        config = change(config, beside, value)
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    changed = change(config, key, another(key, value))
    before, after = (build(TrainingRun(Path("/r"), c), None) for c in (config, changed))
    assert before != after
    json.dumps(after)  # plain values


def test_our_own_keys_are_known_and_not_in_the_document():
    assert set(OURS) <= set(known_keys(Config))
    plain = load(ROOT / "configs/tiny.yaml")
    for key in leaves():
        if is_ours(key):
            value: Any = plain
            for name in key.split("."):
                value = getattr(value, name)
            made = build(TrainingRun(Path("/runs/a"), change(plain, key, "other")), None)
            assert made == document(), key


def test_precision_and_kernels_are_never_left_to_axolotl():
    made = document()
    assert made["fp16"] is False and made["tf32"] is False
    assert isinstance(made["bf16"], bool)
    assert [made[f"lora_{part}_kernel"] for part in ("qkv", "o", "mlp")] == [False] * 3
    assert "context_parallel_size" not in made
    assert made["eval_sample_packing"] is False
    # With packing, Axolotl would drop the last, incomplete batch of every evaluation.
    assert made["dataloader_drop_last"] is False


def test_paths_and_sections():
    made = document()
    assert made["base_model"] == "/runs/a/02_compress/model"
    assert made["plugins"] == [PLUGIN] and made[RUN_KEY] == "/runs/a"
    assert made["output_dir"] == "/runs/a/03_finetune/axolotl"
    assert made["datasets"] == [{"path": "/runs/a/data/encoded", "type": "sparselong"}]
    assert "chat_template" not in made  # the plugin gives Axolotl tokens
    assert made["load_best_model_at_end"] and made["metric_for_best_model"] == "eval_loss"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("lora.r=8", "lora_r", 8),
        ("training.max_steps=7", "max_steps", 7),
        ("training.optimizer=adamw_torch_fused", "optimizer", "adamw_torch_fused"),
        ("training.lr_scheduler=constant", "lr_scheduler", "constant"),
        ("training.sample_packing=false", "sample_packing", False),
        ("seed=7", "seed", 7),
        ("sequence_len=512", "sequence_len", 512),
        ("micro_batch_size=3", "micro_batch_size", 3),
    ],
)
def test_keys_are_passed_on(override, key, value):
    assert document(override)[key] == value


def test_nothing_is_null_and_resume_is_named():
    assert None not in document("training.max_steps=null").values()
    assert "resume_from_checkpoint" not in document()
    made = document(resume_from=Path("/run/03/checkpoints/checkpoint-4"))
    assert made["resume_from_checkpoint"].endswith("checkpoint-4")


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("flash_attention=true", "flash_attention=false"),
        ("training.optimizer=adamw_bnb_8bit", "training.optimizer=adamw_torch"),
    ],
)
def test_unsupported_settings_of_this_machine_are_refused(override, fix):
    config = load(ROOT / "configs/tiny.yaml", [override])
    with pytest.raises(StageError) as refusal:
        refuse_unsupported(config, gpus=0)
    assert fix in refusal.value.fix


def test_settings_that_need_a_gpu_are_accepted_with_one():
    overrides = ["flash_attention=true", "training.optimizer=adamw_bnb_8bit"]
    refuse_unsupported(load(ROOT / "configs/tiny.yaml", overrides), gpus=1)


def test_each_process_needs_its_own_gpu_if_there_are_any():
    config = load(ROOT / "configs/tiny.yaml", ["sequence_parallel_degree=4"])
    refuse_unsupported(config, gpus=4, processes=4)
    with pytest.raises(StageError, match="4 visible GPUs") as refusal:
        refuse_unsupported(config, gpus=3, processes=4)
    assert "sequence_parallel_degree=3" in refusal.value.fix


def test_without_gpus_each_process_needs_a_core(monkeypatch):
    config = load(ROOT / "configs/tiny.yaml", ["sequence_parallel_degree=4"])
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    refuse_unsupported(config, gpus=0, processes=4)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2})
    refuse_unsupported(config, gpus=4, processes=4)
    with pytest.raises(StageError, match="too few cores for 4 processes") as refusal:
        refuse_unsupported(config, gpus=0, processes=4)
    assert refusal.value.found == "2" and "sequence_parallel_degree=2" in refusal.value.fix


def test_axolotl_reports_to_nobody():
    made = document("training.use_tensorboard=true", "training.wandb_project=trial")
    assert (made["use_tensorboard"], made["use_wandb"]) == (False, False)
    assert not {key for key in made if key.startswith(("wandb_", "trackio_", "early_"))}


def test_axolotl_never_splits_sequences():
    made = document("sequence_parallel_degree=4", "heads_k_stride=2")
    assert not {"context_parallel_size", "sequence_parallel_degree"} & set(made)
