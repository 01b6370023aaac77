"""The small gpt-oss: disk format against transformers' reader, reproducibility, template."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Mxfp4Config

from sparselong.data import corpus
from sparselong.errors import StageError
from sparselong.packing import mxfp4
from sparselong.tiny import build as tiny
from sparselong.tiny import measure as tiny_measure
from sparselong.tiny.build import TinySpec, build_tiny
from sparselong.tiny.checkpoint import write_weights

QUIET = {"progress": lambda message: None}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny") / "base", TinySpec(steps=0), **QUIET)


@pytest.fixture(scope="module")
def stored(checkpoint) -> dict[str, torch.Tensor]:
    tensors = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})
    return tensors


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return AutoModelForCausalLM.from_pretrained(
        checkpoint,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,
        attn_implementation="eager",
    )


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


def test_transformers_reads_exactly_what_is_stored(loaded, stored):
    for name, value in loaded.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            decoded = mxfp4.decode(stored[f"{name}_blocks"], stored[f"{name}_scales"])
            wanted = decoded.transpose(1, 2)
        else:
            wanted = stored[name]
        assert torch.equal(value.bfloat16(), wanted), name


def test_writing_a_loaded_checkpoint_again_gives_the_same_bytes(loaded, checkpoint, tmp_path):
    # Fails if the writer transposes, interleaves or rounds differently from transformers' reader.
    write_weights(loaded, tmp_path)
    for file in sorted(tmp_path.iterdir()):
        assert file.read_bytes() == (checkpoint / file.name).read_bytes(), file.name


def test_names_shapes_and_dtypes_match_upstream(stored):
    experts = "model.layers.0.mlp.experts"
    expected = {
        f"{experts}.gate_up_proj_blocks": ((8, 256, 4, 16), torch.uint8),
        f"{experts}.gate_up_proj_scales": ((8, 256, 4), torch.uint8),
        f"{experts}.gate_up_proj_bias": ((8, 256), torch.bfloat16),
        f"{experts}.down_proj_blocks": ((8, 128, 4, 16), torch.uint8),
        f"{experts}.down_proj_scales": ((8, 128, 4), torch.uint8),
        f"{experts}.down_proj_bias": ((8, 128), torch.bfloat16),
        "model.layers.0.mlp.router.weight": ((8, 128), torch.bfloat16),
        "model.layers.0.mlp.router.bias": ((8,), torch.bfloat16),
        "model.layers.0.self_attn.sinks": ((4,), torch.bfloat16),
        "model.layers.0.self_attn.o_proj.weight": ((128, 256), torch.bfloat16),
        "model.embed_tokens.weight": ((2048, 128), torch.bfloat16),
        "lm_head.weight": ((2048, 128), torch.bfloat16),
    }
    found = {name: (tuple(stored[name].shape), stored[name].dtype) for name in expected}
    assert found == expected


def test_index_and_shards_agree(checkpoint, stored):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    in_shards = {}
    for shard in checkpoint.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            in_shards.update(dict.fromkeys(file.keys(), shard.name))
    assert index["weight_map"] == in_shards


def test_some_shards_hold_experts_only_and_one_is_mixed(checkpoint):
    weight_map = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    kinds: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        kind = next((k for k in (".experts.", ".self_attn.") if k in name), "other")
        kinds.setdefault(shard, set()).add(kind)
    assert {".experts."} in kinds.values()
    assert any({".experts.", ".self_attn."} <= found for found in kinds.values())


def test_configuration_is_a_gpt_oss(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["architectures"] == ["GptOssForCausalLM"]
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert (config["head_dim"], config["num_experts_per_tok"]) == (64, 4)
    assert config["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }


@pytest.mark.parametrize(("suffix", "width"), [("bias", 0.05), ("sinks", 1.0)])
def test_biases_and_sinks_have_the_specified_standard_deviation(stored, suffix, width):
    """Within five standard errors for that many normal samples, and none left at zero."""
    found = {name: value.float() for name, value in stored.items() if name.endswith(suffix)}
    assert all(value.std() > 0 for value in found.values())
    drawn = torch.cat([value.flatten() for value in found.values()])
    assert drawn.std() == pytest.approx(width, rel=5 / math.sqrt(2 * len(drawn)))


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path, monkeypatch):
    few = corpus.texts("train")[:12]
    monkeypatch.setattr(corpus, "texts", lambda split: few)
    spec = TinySpec(layers=2, vocab_size=600, steps=2, batch_sequences=2, sequence_len=128)
    folders = [tmp_path / name for name in ("first", "again", "other")]
    for folder, seed in zip(folders, (7, 7, 8), strict=True):
        folder.mkdir()
        tiny._build(folder, spec, seed, say=lambda message: None)
    first, again, other = (
        {file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders
    )
    assert first == again
    assert all(first[name] != other[name] for name in first if name.endswith(".safetensors"))


def test_a_complete_checkpoint_is_kept(checkpoint):
    before = (checkpoint / "tiny.json").stat().st_mtime_ns
    assert build_tiny(checkpoint, TinySpec(steps=0), **QUIET) == checkpoint
    assert (checkpoint / "tiny.json").stat().st_mtime_ns == before


def test_another_spec_replaces_it_and_a_partial_build_is_repeated(tmp_path, monkeypatch):
    def build_a_stub(folder, spec, seed, say):
        assert not any(folder.iterdir())
        (folder / "weights").write_text(str(spec.layers))
        return {}

    monkeypatch.setattr(tiny, "_build", build_a_stub)
    out = tmp_path / "base"
    torn = tmp_path / "base.building"
    torn.mkdir()
    (torn / "half").touch()
    for layers in (2, 3):
        build_tiny(out, TinySpec(layers=layers, steps=0), **QUIET)
        assert (out / "weights").read_text() == str(layers)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StageError, match=r"tiny\.json"):
        build_tiny(tmp_path, TinySpec(steps=0), **QUIET)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("wrong", [{"hidden": 100}, {"heads": 3}, {"experts": 2}, {"layers": 0}])
def test_impossible_specs_are_refused(wrong):
    with pytest.raises(ValueError, match="TinySpec"):
        TinySpec(**wrong)


def test_perplexity_equals_that_of_a_plain_log_softmax(loaded):
    model = loaded.float()
    sequences = torch.randint(0, 2048, (9, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shares = model(input_ids=sequences).logits.double().log_softmax(-1)[:, :-1]
    wanted = math.exp(-shares.gather(-1, sequences[:, 1:, None]).mean().item())
    assert tiny_measure.perplexity(model, sequences) == pytest.approx(wanted, rel=1e-5)
    with tiny_measure.no_attention(model):
        assert tiny_measure.perplexity(model, sequences) != pytest.approx(wanted, rel=1e-3)
    assert tiny_measure.perplexity(model, sequences) == pytest.approx(wanted, rel=1e-5)


def test_measure_publishes_every_figure(checkpoint, tokenizer):
    figures = tiny_measure.measure(checkpoint, held_out_tokens=1024)
    assert figures.pop("held_out_tokens") == 1024
    assert set(figures) == {
        "perplexity",
        "perplexity_without_attention",
        "perplexity_random_two_four",
        "unigram_perplexity",
    }
    # Untrained: logits are independent of the text, so no better than a uniform guess, and worse by
    # what logits of unit standard deviation cost at every token.
    assert 2048 < figures["perplexity"] < 2048 * math.exp(0.5) * 1.2
    assert figures["perplexity_without_attention"] != figures["perplexity"]
    assert figures["perplexity_random_two_four"] != figures["perplexity"]
    assert figures["unigram_perplexity"] == pytest.approx(count_unigrams(tokenizer, 1024))


def count_unigrams(tokenizer, tokens: int) -> float:
    """Perplexity of add-one training counts, over sequences of 256 held-out tokens."""

    def encode(split: str) -> list[int]:
        texts = [f"{text}<|endoftext|>" for text in corpus.texts(split)]
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [token for row in rows for token in row]

    counts = Counter(encode("train"))
    total = sum(counts.values()) + len(tokenizer)
    held_out = encode("held_out")[:tokens]
    losses = [
        -math.log((counts[token] + 1) / total)
        for place, token in enumerate(held_out)
        if place % 256
    ]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(
    "text",
    ["", "  two  spaces\n\n\ttab", "naïve 漢字 😀 \u202e", "".join(map(chr, range(1, 0x300)))],
)
def test_any_text_round_trips_through_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_single_and_last(tokenizer):
    assert len(tokenizer) == 2048
    ids = tokenizer.encode("<|start|>user<|message|>a<|return|>", add_special_tokens=False)
    specials = [tokenizer.convert_ids_to_tokens(i) for i in ids if i >= 2048 - 9]
    assert specials == ["<|start|>", "<|message|>", "<|return|>"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|return|>", "<|endoftext|>")


SYSTEM = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
    "\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. "
    "Channel must be included for every message.<|end|>"
)
QUESTION = {"role": "user", "content": "Why?"}
ASK = "<|start|>user<|message|>Why?<|end|>"
THOUGHT = {"role": "assistant", "content": "So.", "thinking": "Hm."}
ANALYSIS = "<|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>So."


@pytest.mark.parametrize(
    ("messages", "options", "wanted"),
    [
        ([QUESTION, THOUGHT], {}, SYSTEM + ASK + ANALYSIS + FINAL + "<|return|>"),
        ([QUESTION], {"add_generation_prompt": True}, SYSTEM + ASK + "<|start|>assistant"),
        (
            [QUESTION, THOUGHT, QUESTION, THOUGHT],
            {},
            SYSTEM + ASK + FINAL + "<|end|>" + ASK + ANALYSIS + FINAL + "<|return|>",
        ),
        (
            [QUESTION, THOUGHT, QUESTION],
            {"add_generation_prompt": True},
            SYSTEM + ASK + FINAL + "<|end|>" + ASK + "<|start|>assistant",
        ),
        (
            [{"role": "system", "content": "Be brief."}, QUESTION],
            {"reasoning_effort": "high", "knowledge_cutoff": "2024-06"},
            SYSTEM.replace("OpenAI.\n", "OpenAI.\nKnowledge cutoff: 2024-06\n").replace(
                "medium", "high"
            )
            + "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>"
            + ASK,
        ),
    ],
)
def test_template_renders_harmony(tokenizer, messages, options, wanted):
    assert tokenizer.apply_chat_template(messages, tokenize=False, **options) == wanted


def test_template_refuses_what_it_does_not_know(tokenizer):
    with pytest.raises(Exception, match="unknown role"):
        tokenizer.apply_chat_template([{"role": "narrator", "content": ""}], tokenize=False)
    with pytest.raises(Exception, match="reasoning_effort"):
        tokenizer.apply_chat_template([QUESTION], tokenize=False, reasoning_effort="extreme")
