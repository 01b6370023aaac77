"""How a sweep's values are read, and what its runs are called."""

from argparse import Namespace
from pathlib import Path

import pytest

from sparselong.errors import ConfigError
from sparselong.sweep.runs import Run, make_runs
from tests.conftest import ROOT


def made(*items: str, overrides: tuple[str, ...] = ()) -> list[Run]:
    config = str(ROOT / "configs/tiny.yaml")
    return make_runs(Namespace(sweep=items, overrides=overrides, config=config), Path("runs/a"))


@pytest.mark.parametrize(
    ("items", "names"),
    [
        (
            ["training.learning_rate=1e-5,5e-5,2e-4", "lora.r=8,16"],
            [f"r={r},learning_rate={lr}" for lr in ("1e-05", "5e-05", "0.0002") for r in (8, 16)],
        ),
        (["lora.target_modules=[q_proj, k_proj],[v_proj]"], ["q_proj+k_proj", "v_proj"]),
        (["shared_dense.sparsity=none,2:4"], ["none", "2-4"]),
        (["training.early_stopping_patience=null,3"], ["null", "3"]),
        (["training.sample_packing=true,false"], ["true", "false"]),
        (["calibration.sequence_len=64,128", "sequence_len=64"], ["64", "128"]),
        (
            ["calibration.sequence_len=64,128", "sequence_len=96,192"],
            [
                f"calibration.sequence_len={one},sequence_len={other}"
                for one in (64, 128)
                for other in (96, 192)
            ],
        ),
    ],
)
def test_values_are_read_strictly_and_names_need_no_quotes(items, names):
    found = [run.name for run in made(*items)]
    assert found == names or [name.partition("=")[2] for name in found] == names


def test_text_with_commas_is_quoted_and_told_apart_by_a_hash():
    one, other, third = made("data.train=/a b/c.jsonl,'/a,b/c.jsonl',demo")
    assert [run.config.data.train for run in (one, other, third)] == [
        *("/a b/c.jsonl", "/a,b/c.jsonl", "demo"),
    ]
    assert third.name == "train=demo" and one.name != other.name
    assert one.name.startswith("train=a-b-c.jsonl-") and one.name.isascii()


def test_a_name_depends_on_the_values_not_on_how_they_are_written():
    one = made("training.learning_rate=1e-3,2e-3", "lora.r=8,16")
    other = made("lora.r=16,8", "training.learning_rate=0.0010,0.002")
    assert {run.name for run in one} == {run.name for run in other}
    assert len({run.name for run in one}) == 4


def test_one_value_is_an_override_of_every_run():
    for run in made("lora.r=8,16", "training.max_steps=7", overrides=("lora.alpha=5",)):
        assert (run.config.training.max_steps, run.config.lora.alpha) == (7, 5.0)
        assert (
            run.name == f"r={run.config.lora.r}" and run.words[-1] == f"lora.r={run.config.lora.r}"
        )


def test_a_long_name_is_cut_and_ends_in_a_hash():
    folder = "finetuning_modifiers.MagnitudePruningModifier"
    runs = made(
        *(f"{folder}.criterion=hysteresis,magnitude", f"{folder}.update_frequency=0.123456,0.2"),
        *(f"data.train={'x' * 99}.jsonl,demo", "data.validation=null,held_out_conversations.jsonl"),
        *("training.learning_rate=1e-4,2e-4", "calibration.dampening=0.0123456789"),
    )
    assert len({run.name for run in runs}) == len(runs) == 2**5
    assert 160 < max(len(run.name) for run in runs) <= 170


@pytest.mark.parametrize(
    ("items", "part"),
    [
        (["lora.r"], "KEY=VALUE,VALUE"),
        (["lora.r=8"], "has one value for each key"),
        (["lora.r=8,"], "an empty value"),
        (["lora.r=,8"], "an empty value"),
        (["lora.target_modules=[q_proj],[k_proj"], "a closing ]"),
        (["lora.target_modules=q_proj],[k_proj]"], "an opening bracket before ]"),
        (["data.train='a.jsonl,b.jsonl"], "a closing '"),
        (["lora.q=8,16"], "did you mean lora.r?"),
        (["lora={r: 8},{r: 16}"], "a key of the section lora"),
        (["lora.r=8,16", "lora.r=2,4"], "lora.r twice"),
        (["lora.r=8,08"], "lora.r=8 twice"),
        (["training.learning_rate=1e-4,0.0001"], "two combinations of the sweep are the same"),
        (["lora.r=8,x"], "lora.r is not valid"),
        (["lora.expert_targets=[],[down_proj]", "lora.expert_r=4"], "expert_targets is empty"),
        (["training.optimizer=adamw_torch,adam_mini"], "'lion_8bit'"),
        (["sequence_parallel_degree=1,2"], "sequence_parallel_degree: 03_finetune's result"),
        (["evaluation.batch_size=1,2", "lora.r=8,16"], "does not depend on it"),
    ],
)
def test_what_is_no_sweep_is_refused(items, part):
    with pytest.raises(ConfigError) as refusal:
        made(*items)
    assert part in str(refusal.value)


def test_fixed_words_with_two_values_for_a_key_are_refused():
    with pytest.raises(ConfigError, match="lora.alpha is set twice"):
        made("lora.r=8,16", "lora.alpha=6", overrides=("lora.alpha=5",))


def test_a_key_set_beside_its_sweep_is_refused():
    with pytest.raises(ConfigError, match="lora.r is set beside the sweep over it"):
        made("lora.r=8,16", overrides=("lora.r=4",))
