"""The planner against published counts, exact storage, measured peaks and written files."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparselong import memory
from sparselong.config import schema as config_module
from sparselong.config.schema import ModelSection
from sparselong.errors import StageError
from sparselong.memory import shape as shape_module
from sparselong.memory import stages, storage, timing, training

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
BIG, SMALL = (memory.PUBLISHED[f"openai/gpt-oss-{size}"] for size in ("120b", "20b"))


def load(name: str, *overrides: str):
    return config_module.load(ROOT / f"configs/{name}.yaml", overrides)


CONFIG = load("gpt-oss-120b-4x3090")


def test_parameters_match_the_published_checkpoints():
    def counts(s):
        return (
            *(s.total, s.expert_weights, s.expert_biases, s.attention_weights, s.attention_biases),
            *(s.sinks, s.router, s.norms, s.embedding),
        )

    assert counts(BIG) == (
        *(116_829_156_672, 114_661_785_600, 39_813_120, 955_514_880, 288_000),
        *(2_304, 13_275_648, 210_240, 579_133_440),
    )
    assert counts(SMALL) == (
        *(20_914_757_184, 19_110_297_600, 6_635_520, 637_009_920, 192_000),
        *(1_536, 2_212_608, 141_120, 579_133_440),
    )
    assert [round(s.active / 1e9, 2) for s in (BIG, SMALL)] == [5.13, 3.61]


def test_tiny_shape_matches_the_created_model(untrained_base):
    from sparselong.tiny.build import TinySpec

    spec, shape = TinySpec(layers=6), shape_module.tiny_shape(6)
    assert (shape.vocab, shape.head_dim) == (spec.vocab_size, 64)
    for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "experts"):
        assert getattr(shape, name) == getattr(spec, name), name
    assert shape.sliding_window == spec.sliding_window
    assert shape_module.read_shape(untrained_base / "config.json") == shape_module.tiny_shape(4)


def test_base_groups_match_the_bytes_of_a_real_checkpoint(untrained_base):
    index = json.loads((untrained_base / "model.safetensors.index.json").read_text())
    planned = sum(storage.base_groups(shape_module.tiny_shape(4)).values())
    assert planned == index["metadata"]["total_size"]


@pytest.mark.parametrize(
    ("bits", "sparsity", "group", "wanted"),
    [
        (4, "2:4", 64, 3.0),
        (4, "2:4", 32, 3.25),
        (4, "none", 64, 4.25),
        (8, "2:4", 64, 5.0),
        (8, "none", 32, 8.5),
        (16, "2:4", 64, 8.75),
        (16, "none", 64, 16.0),
    ],
)
def test_dense_bits_match_packing(bits, sparsity, group, wanted):
    from sparselong.packing.dense import DenseFormat

    tensors = DenseFormat(bits, sparsity, group).empty(6, 128)
    stored = sum(t.numel() * t.element_size() for t in tensors.values()) * 8 / (6 * 128)
    assert storage.dense_bits(bits, sparsity, group) == wanted == stored


def test_expert_storage_is_exact():
    def experts_gb(shape, sparsity):
        return round(shape.expert_weights * storage.expert_bits(sparsity) / 8 / 1e9, 1)

    assert (storage.expert_bits("none"), storage.expert_bits("2:4")) == (4.25, 3.0)
    assert [experts_gb(BIG, "none"), experts_gb(SMALL, "none")] == [60.9, 10.2]
    assert [experts_gb(BIG, "2:4"), experts_gb(SMALL, "2:4")] == [43.0, 7.2]


def test_compressed_120b_by_group():
    groups = storage.compressed_groups(BIG, CONFIG)
    assert groups == {
        "experts": 60_914_073_600,
        "attention": 358_318_080,
        "embedding": 2_316_533_760,
        "small": 107_178_624,
    }
    assert sum(storage.base_groups(BIG).values()) == 65_248_815_744
    assert storage.masters_bytes(BIG, CONFIG) == 1_911_029_760
    plain = load("gpt-oss-120b-4x3090", "shared_dense.weight_bits=16", "shared_dense.sparsity=none")
    assert storage.masters_bytes(BIG, plain) == 0


def test_compressed_tiny_matches_what_stage_02_writes():
    """2,071,904 bytes: the tensors in the index of a real compressed tiny model."""
    groups = storage.compressed_groups(shape_module.tiny_shape(4), load("tiny"))
    assert sum(groups.values()) == 2_071_904


def test_adapters_of_experts_and_router_are_counted():
    def count(*overrides: str) -> int:
        return storage.lora_parameters(BIG, load("gpt-oss-120b-4x3090", *overrides))

    plain = count()
    targets = "lora.expert_targets=[gate_up_proj, down_proj]"
    assert count(targets, "lora.expert_r=8") - plain == 530_841_600
    down = count("lora.expert_targets=[down_proj]", "lora.expert_r=8") - plain
    assert down == 36 * 128 * 8 * (2880 + 2880)
    assert count("lora.router=true") - plain == 36 * 16 * (2880 + 128)


def test_only_the_120b_base_can_be_linked():
    assert storage.linkable_bytes(BIG, CONFIG)["compressed_model"] == 63_337_785_984
    assert storage.linkable_bytes(SMALL, CONFIG)["compressed_model"] == 0
    half = load("gpt-oss-120b-4x3090", "experts.sparsity=2:4")
    assert storage.linkable_bytes(BIG, half)["compressed_model"] == 0
    routed = load("gpt-oss-120b-4x3090", "lora.router=true")
    assert storage.linkable_bytes(BIG, routed)["finetuned_model"] == 0


@pytest.mark.parametrize(("tokens", "measured_gib"), [(4096, 48.9), (8192, 58.8), (16384, 78.4)])
def test_activations_and_loss_reproduce_the_measured_20b_peaks(tokens, measured_gib):
    """transformers with bf16 weights: the plan's checkpoints and adapters, bf16 weights, and a loss
    over all logits (12 bytes each, not alive at the same time as a layer)."""
    plan = training.finetune_memory(SMALL, load("gpt-oss-20b-1x3090", f"sequence_len={tokens}"))
    parts = plan.components
    rest = parts["checkpoints"] + parts["lora"]
    peak = rest + tokens * SMALL.vocab * 12 + SMALL.total * 2
    assert peak / GIB == pytest.approx(measured_gib, rel=0.02)


def test_the_sequence_is_sharded_and_the_model_replicated():
    present = training.finetune_memory(BIG, CONFIG)
    assert present.devices == 4
    assert present.components["experts"] == 60_914_073_600
    assert present.components["loss"] == 512 * 201_088 * 2 + 4096 * 2880 * 8


def test_the_loss_matches_the_measurement():
    """benchmarks/results, without inputs and gradient, from 16,384 supervised tokens."""
    path = sorted((ROOT / "benchmarks/results").glob("neighbours-h200-*.json"))[-1]
    chunks = f"ours, chunks of {training.LOSS_CHUNK_ROWS}"
    for entry in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        case = entry["case"]
        if (entry["backend"], entry["metric"]) == (chunks, "peak_bytes"):
            gradient = case["tokens"] * SMALL.hidden * 2
            planned = training.finetune_memory(
                SMALL, load("gpt-oss-20b-1x3090", f"sequence_len={case['tokens']}")
            ).components["loss"]
            assert entry["value"] + gradient <= 1.05 * planned


def test_peak_counts_alternating_parts_once():
    names = (training.LAYER, training.EXPERTS, training.ATTENTION, training.LOSS)
    parts: dict[str, int] = dict(zip((*names, "rest"), (5, 2, 3, 6, 1), strict=True))
    assert training.Memory("cuda", 1, parts).peak_bytes == 1 + 5 + 3
    parts[training.LOSS] = 60
    assert training.Memory("cuda", 1, parts).peak_bytes == 1 + 60


def test_eager_attention_and_kept_activations_cost_more():
    base = load("gpt-oss-20b-1x3090")
    eager = load("gpt-oss-20b-1x3090", "flash_attention=false")
    kept = load("gpt-oss-20b-1x3090", "training.gradient_checkpointing=false")
    peaks = [training.finetune_memory(SMALL, c).peak_bytes for c in (base, eager, kept)]
    assert peaks[1] > peaks[0] + 64 * 16384**2 * 2 * 4 - 40 * GIB
    assert peaks[2] > peaks[0] + 20 * GIB


def test_evaluation_grows_with_the_batch_until_it_is_full():
    def parts(batch):
        config = load("gpt-oss-20b-1x3090", f"evaluation.batch_size={batch}")
        return stages.evaluation_memory(SMALL, config, "cuda")

    assert 13 * GIB < sum(parts(1).values()) < sum(parts(8).values()) < 24 * GIB
    live = [parts(batch)["live"] for batch in (8, 16, 32)]
    assert 2 * live[0] == live[1] == live[2]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_evaluation_holds_the_keys_of_the_longest_prompt(device):
    def parts(*overrides):
        config = load("gpt-oss-20b-1x3090", "evaluation.batch_size=1", *overrides)
        return stages.evaluation_memory(SMALL, config, device)

    drawn = "evaluation.tasks=[hellaswag,ruler_vt]"
    short, long, longest = (
        parts(drawn, f"evaluation.ruler.lengths=[4096,{length}]")
        for length in (8192, 65_536, 131_072)
    )
    width = 4 if device == "cpu" else 2
    assert short["cache"] == 0 and sum(short.values()) == sum(parts().values())
    assert longest["cache"] - long["cache"] == 65_536 * 12 * 2 * 512 * width
    assert sum(longest.values()) - sum(long.values()) == longest["cache"] - long["cache"]
    unused = parts("evaluation.ruler.lengths=[131072]")
    assert unused == parts()


@pytest.mark.parametrize("stage", ["02_compress", "04_eval"])
def test_only_eager_attention_stores_scores(stage):
    """Regression: stage 04 was planned with eager scores although it uses kernels."""
    ours, eager = (
        memory.make_plan(load("gpt-oss-20b-1x3090", f"flash_attention={on}"), "cuda").stages[stage]
        for on in ("true", "false")
    )
    cases = {"02_compress": (16_384, 4096, 2048), "04_eval": (8192, 8192, 1024)}
    tokens, eager_tokens, length = cases[stage]
    assert ours["attention"] == tokens * 2 * (4096 + 512) * 2
    own = eager_tokens * 2 * (4096 + 512) * 2
    assert eager["attention"] - own == 5 * 64 * eager_tokens * length * 2


def test_time_reproduces_the_arithmetic_limits():
    """4 × 71 and 990 TFLOP/s at 16,384 tokens: 6,820 tok/s for 120b, 34,184 for 20b."""
    flops = [timing.training_flops(s, CONFIG, masked_lora=False) for s in (BIG, SMALL)]
    assert 284e12 / flops[0] == pytest.approx(6_820, rel=0.01)
    assert 990e12 / flops[1] == pytest.approx(34_184, rel=0.01)
    extra = timing.training_flops(BIG, CONFIG) / flops[0]
    assert 1.03 < extra < 1.06


def test_rates_are_looked_up_by_gpu_name():
    assert timing.find_rate("NVIDIA H200").flops_per_second == 990e12
    assert timing.find_rate("NVIDIA GeForce RTX 3090").flops_per_second == 71e12
    assert timing.find_rate(None) is timing.CPU


def test_the_estimate_is_for_the_gpu_that_is_named_and_says_as_what_an_unknown_one_was_taken():
    config = load("gpt-oss-20b-1x3090", "cost.per_gpu_hour=2")
    names = ("NVIDIA H200", "NVIDIA L4", "NVIDIA GeForce RTX 3090")
    h200, unknown, small = (
        memory.make_plan(config, "cuda", name, gpus=2).estimates[0] for name in names
    )
    assert (h200.gpu, h200.gpus, h200.price) == ("NVIDIA H200", 2, 2.0)
    assert unknown.gpu == "NVIDIA L4, taken as an RTX 3090" and unknown.seconds == small.seconds
    assert h200.seconds["03_finetune"] < small.seconds["03_finetune"] / 3
    both = small.describe(["02_compress", "03_finetune"])
    two, three = small.seconds["02_compress"], small.seconds["03_finetune"]
    assert both["hours"] == pytest.approx((two + three) / 3600)
    assert both["gpu_hours"] == pytest.approx((two + 2 * three) / 3600)


def test_training_tokens():
    steps = load("tiny", "training.max_steps=10", "micro_batch_size=2", "sequence_len=128")
    assert timing.training_tokens(steps, None)[0] == 10 * 2 * 128
    assert timing.training_tokens(CONFIG, 4000)[0] == 1000
    assert timing.training_tokens(CONFIG, None)[0] == timing.ASSUMED_TOKENS


@pytest.mark.parametrize("name", ["tiny", "gpt-oss-20b-1x3090", "gpt-oss-120b-4x3090"])
@pytest.mark.parametrize("stage", ["01_health", "02_compress", "03_finetune", "04_eval"])
def test_every_stage_of_every_shipped_config_has_a_plan(tmp_path, name, stage):
    run_dir = tmp_path / "run"
    document = memory.plan_stage(load(name), run_dir, stage)
    assert not run_dir.exists()
    assert json.loads(json.dumps(document)) == document
    assert document["estimated_seconds"] > 0
    assert document["device"] == ("cpu" if name == "tiny" else "cuda")
    assert document["bytes_on_disk"] == sum(row["bytes"] for row in document["writes"])
    text = memory.show_plan(document)
    assert max(map(len, text.splitlines())) <= 100
    if stage != "01_health":
        assert document["peak_bytes_per_gpu"] > GIB and "peak" in text


def test_a_longer_run_directory_does_not_widen_the_table(tmp_path):
    run_dir = tmp_path / ("long-" * 30)
    document = memory.plan_stage(load("tiny"), run_dir, "03_finetune")
    assert max(map(len, memory.show_plan(document).splitlines())) <= 100


def test_tiny_with_flash_attention_is_planned_for_a_gpu():
    assert memory.make_plan(load("tiny", "flash_attention=true")).device == "cuda"


def test_shape_refusals(tmp_path):
    def refusal(text: str) -> str:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(StageError) as caught:
            memory.find_shape(ModelSection(base=str(tmp_path)))
        return str(caught.value)

    assert "cannot be read" in refusal("{")
    assert "model_type 'llama'" in refusal('{"model_type": "llama"}')
    assert "a JSON list" in refusal("[]")
    method = '"quantization_config": {"quant_method": "mxfp4"}'
    lacking = f'{{"model_type": "gpt_oss", "num_hidden_layers": 2, {method}}}'
    assert "no num_local_experts" in refusal(lacking)
    with pytest.raises(StageError, match="is unknown"):
        memory.find_shape(ModelSection(base="nobody/nothing-here"))
    with pytest.raises(StageError, match="is unknown"):
        memory.find_shape(ModelSection(base=str(tmp_path / "no/such/folder")))


def test_planner_never_imports_torch():
    code = (
        "import sys; from pathlib import Path; from sparselong import memory;"
        "from sparselong.config import schema; c = schema.load('configs/tiny.yaml');"
        "print(memory.show_plan(memory.plan_stage(c, Path('runs/x'), '03_finetune')));"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_shapes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BIG.layers = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_the_time_of_stage_04_grows_with_what_ruler_reads():
    """Six items of 8,192 tokens each, beside hellaswag's, at their own length's cost."""

    def seconds(*overrides: str) -> float:
        tasks = "evaluation.tasks=[hellaswag,ruler_vt,ruler_cwe]"
        settings = (tasks, "evaluation.ruler.items=3", *overrides)
        return memory.make_plan(load("gpt-oss-20b-1x3090", *settings)).seconds["04_eval"]

    alone = seconds("evaluation.tasks=[hellaswag]")
    found = seconds("evaluation.ruler.lengths=[8192]") - alone
    plan = memory.make_plan(load("gpt-oss-20b-1x3090"))
    speed = plan.rate.flops_per_second * plan.rate.efficiency
    read = 3 * 6 * 8192 * sum(timing.forward_flops(plan.shape, 8192))
    assert found == pytest.approx(read / speed)
    limited = seconds("evaluation.ruler.lengths=[8192]", "evaluation.limit=2")
    assert limited - seconds("evaluation.tasks=[hellaswag]", "evaluation.limit=2") == (
        pytest.approx(found * 2 / 3)
    )
