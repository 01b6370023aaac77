"""Config that could only fail later: refused by every script alike, with key and place."""

import json
import shutil

import pytest

from sparselong.config import load
from sparselong.data import check_tasks
from sparselong.errors import ConfigError
from sparselong.memory import check_model
from tests.conftest import ROOT

TINY = ROOT / "configs/tiny.yaml"
SCRIPTS = ("01_health", "02_compress", "03_finetune", "04_eval", "05_export")
REFUSED = [
    *("seed=4294967296", "seed=-1", "seed=1.0", "seed='1'", "seed=1e3", "seed=true"),
    *("seed=.nan", "seed=" + "9" * 400),
    *("lora.target_modules=[self_attn.q_proj]", "lora.target_modules=[lm_head]"),
    *("lora.target_modules=[q_proj, q_proj]", "lora.target_modules=[]", "lora.target_modules=[q]"),
    *("lora.target_modules=[router]", "lora.target_modules=[Q_PROJ]", "lora.target_modules=['']"),
    *("lora.r=0", "lora.r=99999999999", "lora.alpha=.inf", "lora.alpha=1e300", "lora.alpha=-1"),
    *("evaluation.ruler.lengths=[]", "evaluation.ruler.lengths=[4096,4096]"),
    *("evaluation.ruler.lengths=[1]", "evaluation.ruler.items=1"),
    *("evaluation.tasks=[a, a]", "evaluation.tasks=[]", "evaluation.tasks=[../x.yaml]"),
    *("evaluation.tasks=['']", "evaluation.tasks=[' a']", "evaluation.tasks=hellaswag"),
    *("evaluation.tasks=[x.yaml]", "evaluation.tasks=[1]", "evaluation.limit=1"),
    *("evaluation.limit=0", "evaluation.limit=0.5", "evaluation.num_fewshot=-1"),
    *("evaluation.num_fewshot=1000000", "evaluation.batch_size=0"),
    *("training.warmup_ratio=1", "training.warmup_ratio=-0.1", "training.max_steps=0"),
    *("training.max_steps=1000000000000", "training.num_epochs=0", "training.num_epochs=1e300"),
    *("training.num_epochs=.nan", "training.learning_rate=0", "training.learning_rate=1e30"),
    *("training.weight_decay=-1", "training.weight_decay=1e30", "training.loss_target=-1"),
    *("training.save_steps=7", "training.eval_steps=0", "training.logging_steps=7"),
    *("training.wandb_project=a/b", "training.wandb_project=a#b", "training.wandb_project=a:b"),
    "training.wandb_project=" + "x" * 129,
    *("training.trackio_project=a/b", "training.trackio_project="),
    *("training.metrics=figures", "training.metrics=figures.py", "training.metrics=figures.py:"),
    *("training.metrics=figures.txt:f", "training.metrics=figures.py:a.b", "training.metrics=:f"),
    *("training.early_stopping_threshold=-1", "training.early_stopping_threshold=0.1"),
    "training.early_stopping_patience=0",
    *("data.validation_fraction=0", "data.validation_fraction=1", "data.validation_fraction=1.5"),
    *("sequence_len=1", "sequence_len=4096.0", "sequence_len=1000000000000"),
    *("sequence_parallel_degree=0", "heads_k_stride=0", "micro_batch_size=0"),
    *("model.tiny_layers=0", "model.tiny_steps=-1", "calibration.samples=0"),
    *("calibration.sequence_len=1", "calibration.dampening=0", "shared_dense.group_size=48"),
    *("experts.weight_bits=8", "model.revision="),
    *("expert_parallel_degree=0", "expert_parallel_degree=-1", "expert_parallel_degree=1.5"),
    *("expert_parallel_degree=all", "expert_parallel_degree=true", "expert_parallel_degree="),
    *("lora.expert_dtype=float16", "lora.expert_dtype=bfloat16"),
]


@pytest.mark.parametrize("override", REFUSED)
def test_the_schema_refuses_it(override):
    with pytest.raises(ConfigError) as caught:
        load(TINY, [override])
    assert override.partition("=")[0] in caught.value.what
    assert "override" in caught.value.what and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("seed: 4294967296\n", "seed is not valid .*line 1"),
        ("seed: 1\nlora:\n  target_modules: [q_proj, q_proj]\n", "target_modules .*line 3"),
        ("evaluation:\n  tasks: [a, a]\n", "evaluation.tasks .*line 2"),
        ("training:\n  eval_steps: 20\n  save_steps: 30\n", "save_steps .*line 3"),
        ("lora:\n  expert_r: 8\n", "lora.expert_r .*line 2"),
    ],
)
def test_a_refusal_names_the_line(text, place, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=place):
        load(tmp_path / "c.yaml")


def test_the_extremes_are_accepted():
    extremes = ["seed=4294967295", "lora.target_modules=[o_proj]", "evaluation.limit=2"]
    assert load(TINY, extremes).seed == 2**32 - 1


MODEL_DEPENDENT = [
    (["lora.r=129"], ["lora.r", "128"]),
    (["lora.expert_targets=[down_proj]", "lora.expert_r=64"], []),
    (["sequence_len=131073"], ["sequence_len", "131,072"]),
    (["calibration.sequence_len=131073"], ["calibration.sequence_len", "131,072"]),
    (["sequence_parallel_degree=2", "heads_k_stride=4"], ["heads_k_stride"]),
    (["model.tiny_layers=4", "lora.r=128"], []),
    (["expert_parallel_degree=8"], []),
    (["expert_parallel_degree=3"], ["expert_parallel_degree", "8 experts", "1, 2, 4, 8"]),
    (["expert_parallel_degree=16"], ["expert_parallel_degree", "8 experts"]),
]


@pytest.mark.parametrize(("overrides", "words"), MODEL_DEPENDENT)
@pytest.mark.parametrize("base", ["tiny", "directory"])
def test_what_the_base_model_decides(overrides, words, base, untrained_base):
    more = [] if base == "tiny" else [f"model.base={untrained_base}"]
    config = load(TINY, [*overrides, *more])
    if not words:
        check_model(config)
        return
    with pytest.raises(ConfigError) as caught:
        check_model(config)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "overrides", "word"),
    [
        ({"hidden_size": 96}, [], "shared_dense.group_size"),
        ({"hidden_size": 96}, ["shared_dense.group_size=32"], ""),
        ({"hidden_size": 96}, ["shared_dense.weight_bits=16"], ""),
        (
            {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 30},
            ["shared_dense.weight_bits=16", "lora.r=8"],
            "shared_dense.sparsity",
        ),
        ({"max_position_embeddings": 100}, ["sequence_len=101"], "sequence_len"),
        (
            {"max_position_embeddings": 8192},
            ["evaluation.tasks=[ruler_vt]", "evaluation.ruler.lengths=[16384,4096]"],
            "evaluation.ruler.lengths is longer",
        ),
        ({"max_position_embeddings": 8192}, ["evaluation.ruler.lengths=[16384]"], ""),
        (
            {"max_position_embeddings": 8192},
            ["evaluation.health_tokens=7681"],
            "evaluation.health_tokens is longer(?s:.*)512 of them(?s:.*) to 7680 or less",
        ),
        ({"max_position_embeddings": 8192}, ["evaluation.health_tokens=7680"], ""),
        (
            {"max_position_embeddings": 8192},
            ["evaluation.health_tokens=9000", "evaluation.health_prompts=0"],
            "",
        ),
        ({"max_position_embeddings": "x"}, [], ""),
        ({"intermediate_size": 32}, ["lora.expert_targets=[down_proj]", "lora.expert_r=33"], "exp"),
    ],
)
def test_sizes_of_other_models(changes, overrides, word, untrained_base, tmp_path):
    base = shutil.copytree(untrained_base, tmp_path / "base")
    described = json.loads((base / "config.json").read_text()) | changes
    (base / "config.json").write_text(json.dumps(described))
    config = load(TINY, [f"model.base={base}", *overrides])
    if not word:
        check_model(config)
        return
    with pytest.raises(ConfigError, match=word):
        check_model(config)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_refuses_alike(script, run_script, tmp_path):
    unknown = ("evaluation.tasks=[hellasvag]", "hellaswag?")
    generated = ("evaluation.tasks=[humaneval]", "code that the model writes")
    wrong = (("lora.r=129", "lora.r"), ("seed=4294967296", "seed"), unknown, generated)
    for override, word in wrong:
        outcome = run_script(script, override)
        outcome.assert_explained(word)
        assert outcome.code == 2 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("hellaswag", "arc_easy", "mmlu", "mmlu_anatomy", "winogrande", "ai2_arc", "piqa"),
        *("gsm8k", "wikitext", "lambada_openai", "squadv2", "mmlu_flan_cot_zeroshot"),
        *("math_word_problems", "ruler_vt", "niah_multikey_3"),
    ],
)
def test_tasks_of_lm_eval_are_known(name):
    check_tasks(load(TINY, [f"evaluation.tasks=[{name}]"]))


@pytest.mark.parametrize("name", ["arc", "validation", "default"])
def test_words_and_folders_of_lm_eval_are_no_tasks(name):
    """Its files mention them, but stage 04 would refuse them after hours of training."""
    with pytest.raises(ConfigError, match=f"names {name}, which lm-eval does not have"):
        check_tasks(load(TINY, [f"evaluation.tasks=[{name}]"]))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("humaneval", "it runs the code that the model writes"),
        ("chartqa", "images or audio"),
        ("ifeval_nope", None),
        ("gsm8k_cot_self_consistency", "generation_kwargs that draw tokens"),
        ("niah_single_2", "its essays come from the network"),
        ("ruler", "a group, seven tasks of which need the network"),
    ],
)
def test_tasks_that_cannot_be_measured_are_refused_by_their_definition(name, found):
    """Before hours of training, not after."""
    what = "cannot be measured" if found else "which lm-eval does not have"
    with pytest.raises(ConfigError, match=f"{name}.*{what}") as refusal:
        check_tasks(load(TINY, [f"evaluation.tasks=[hellaswag,{name}]"]))
    assert refusal.value.found == (found or name)


def test_workers_are_counted_by_the_cores_that_the_process_may_use(monkeypatch):
    from sparselong.processes.launch import find_world, rank_environments

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    world = find_world(load(TINY, ["sequence_parallel_degree=2"]))
    made = rank_environments(world, gpus=0)
    assert [each["OMP_NUM_THREADS"] for each in made.values()] == ["2", "2"]
