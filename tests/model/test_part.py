"""Models that hold a part of experts and vocabulary: tensors, bytes read, refusals, passes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssForCausalLM

import sparselong.checkpoint.checkpoint
from sparselong.errors import StageError
from sparselong.kernels.experts import expert_mlp
from sparselong.model import Part, chunk_loss, describe_weights, load_model
from sparselong.model.loading import packed_config
from sparselong.model.packed_experts import PackedExperts
from sparselong.model.part import read_withheld
from sparselong.model.vocabulary import PartialEmbedding, PartialHead
from sparselong.parallel.placement import Placement
from sparselong.runtime import using
from tests.model.conftest import KINDS
from tests.model.exchanges import FakeExperts, FakeVocabulary, exchanges

IDS = torch.randint(9, 2000, (2, 60), generator=torch.Generator().manual_seed(3))


def parts_of(model) -> dict[str, Part]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Part) and not m.is_whole}


def assert_slices(part, whole) -> None:
    """Compare every tensor with the rows of the whole model's that the part's module holds."""
    wanted, parts = whole.state_dict(), parts_of(part)
    found = part.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        expected = wanted[name]
        module = parts.get(name.rpartition(".")[0])
        if module is not None:
            assert module.total == len(expected)
            expected = expected[module.held.start : module.held.stop]
        assert tensor.dtype == expected.dtype and tensor.device == expected.device
        assert torch.equal(tensor, expected), name
    assert not any(p.requires_grad for n, p in part.named_parameters() if "norm" not in n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "rows_over"), [(2, 5), (4, 3)])
def test_a_part_has_the_rows_of_the_whole_model(checkpoints, kind, size, rows_over):
    """The vocabulary, 2,048, is divisible by neither 3 nor 5; the last process has fewer rows."""
    whole = load_model(checkpoints[kind])
    for rank in range(size):
        row_rank = rows_over - 1 - rank if rank < rows_over else 0
        vocabulary = FakeVocabulary(Placement(row_rank, rows_over), whole)
        with using(experts=FakeExperts(Placement(rank, size)), vocabulary=vocabulary):
            part = load_model(checkpoints[kind])
        assert len(parts_of(part)) == 4 + 2
        experts: Any = part.model.layers[1].mlp.experts
        assert experts.down_proj_blocks.shape[0] == 8 // size
        assert part.lm_head.weight.shape[0] == len(Placement(row_rank, rows_over).vocabulary(2048))
        assert_slices(part, whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_from_pretrained_opens_a_part(checkpoints, kind, dtype):
    """As Axolotl does: only the quantizer of this project runs."""
    config = packed_config(checkpoints[kind]) if kind == "upstream" else None
    arguments = {"config": config, "dtype": dtype, "device_map": {"": "cpu"}}
    whole = AutoModelForCausalLM.from_pretrained(checkpoints[kind], **arguments)
    with using(**exchanges(1, 2)):
        opened: Any = AutoModelForCausalLM.from_pretrained(
            checkpoints[kind], output_loading_info=True, **arguments
        )
    part, info = opened
    assert not any(info.values()), info
    for model in (part, whole):
        model.requires_grad_(False)
    assert part.lm_head.weight.dtype == dtype
    assert_slices(part, whole)
    with pytest.raises(ValueError, match="not serializable"):
        part.save_pretrained("never-written")


class _Counted:
    """safe_open that adds up the bytes of what is read, by tensor name."""

    read: dict[str, int]

    def __init__(self, *args, **kwargs):
        self.file = safe_open(*args, **kwargs)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        counted, stored = self, self.file.get_slice(name)

        class Slice:
            def get_dtype(self):
                return stored.get_dtype()

            def get_shape(self):
                return stored.get_shape()

            def __getitem__(self, index):
                tensor = stored[index]
                counted.read[name] = counted.read.get(name, 0) + tensor.nbytes
                return tensor

        return Slice()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_held_rows_are_read(checkpoints, kind, monkeypatch):
    read = {}
    counted = type("Counted", (_Counted,), {"read": read})
    for module in (transformers.modeling_utils, sparselong.checkpoint.checkpoint):
        monkeypatch.setattr(module, "safe_open", counted)
    with using(**exchanges(2, 4)):
        load_model(checkpoints[kind])
    tensors = sparselong.checkpoint.checkpoint.Checkpoint(checkpoints[kind]).tensors
    assert read.keys() == tensors.keys()
    for name, record in tensors.items():
        stored = record.end - record.begin
        divided = ".experts." in name or name.startswith(("model.embed_tokens", "lm_head"))
        assert read[name] == stored // (4 if divided else 1), name


def enlarge(base: Path, folder: Path, times: int) -> Path:
    """Copy a base with `times` as many experts and a larger vocabulary."""
    target = shutil.copytree(base, folder / "large")
    config = json.loads((target / "config.json").read_text())
    config["num_local_experts"] *= times
    config["vocab_size"] *= times
    (target / "config.json").write_text(json.dumps(config))
    tensors = {}
    for path in target.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    for name, tensor in tensors.items():
        if any(part in name for part in (".experts.", "router", "embed_tokens", "lm_head")):
            tensors[name] = torch.cat([tensor] * times)
    (target / "model.safetensors.index.json").unlink()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def test_host_memory_stays_near_the_part(untrained_base, tmp_path):
    """Peak of resident memory, mapped pages of the files included."""
    large = enlarge(untrained_base, tmp_path, 32)
    size = (large / "model.safetensors").stat().st_size
    with using(**exchanges(3, 4)):
        load_model(untrained_base)  # what the first opening allocates for good
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        part = load_model(large)
        peak = status("VmHWM")
    held = sum(t.nbytes for t in part.state_dict().values())
    assert size > 60e6 and held < 0.5 * size
    assert peak - before < held + 0.45 * size  # one slice at a time, and its check


@pytest.mark.parametrize("kind", ["upstream", "stage 02, 2:4"])
def test_passes_go_through_the_exchanges(checkpoints, kind):
    """The stand-ins combine the part's tensors with a whole model's; loss and gradient are its."""
    whole = load_model(checkpoints[kind])
    chunk_loss(whole)
    outcomes = []
    for rank in (None, 0, 1):
        with using(**(exchanges(rank, 2, whole) if rank is not None else {})):
            model = load_model(checkpoints[kind])
            chunk_loss(model)
            sinks: Any = model.model.layers[0].self_attn.sinks.requires_grad_()
            loss: Any = model(IDS, labels=IDS, use_cache=False).loss
        outcomes.append((loss, *torch.autograd.grad(loss, sinks)))
    for loss, gradient in outcomes[1:]:
        assert torch.equal(loss, outcomes[0][0]) and torch.equal(gradient, outcomes[0][1])


def test_all_experts_held_need_no_exchange(untrained_base, monkeypatch):
    with using(**exchanges(0, 1)):
        model = load_model(untrained_base)
        assert not parts_of(model) and type(model.lm_head) is torch.nn.Linear
        inside = model(IDS).logits
    assert torch.equal(model(IDS).logits, inside)


def test_a_pass_in_other_settings_is_refused(untrained_base):
    whole: Any = load_model(untrained_base)
    with using(**exchanges(1, 4, whole)):
        part: Any = load_model(untrained_base)
    x, indices = torch.randn(3, whole.config.hidden_size), torch.zeros(3, 1, dtype=torch.int64)
    call = (x, indices, torch.ones(3, 1))
    experts = part.model.layers[0].mlp.experts
    with pytest.raises(ValueError, match=r"holds 2 to 3 of 8, .*without the setting.*using\(exp"):
        experts(*call)
    with pytest.raises(ValueError, match=r"experts: .*expects 4 to 5; allowed"):
        with using(experts=FakeExperts(Placement(2, 4))):
            experts(*call)
    with pytest.raises(ValueError, match=r"experts: .*holds 0 to 7 of 8, .*expects 0 to 3"):
        with using(experts=FakeExperts(Placement(0, 2))):
            whole.model.layers[0].mlp.experts(*call)
    with pytest.raises(ValueError, match=r"vocabulary: .* 512 to 1023 of 2048, .*without"):
        part.model.embed_tokens(IDS)
    with pytest.raises(ValueError, match=r"vocabulary: .*expects 0 to 511"):
        with using(vocabulary=FakeVocabulary(Placement(0, 4), whole)):
            part.model.embed_tokens(IDS)
    with using(**exchanges(1, 4, whole)):
        expected = expert_mlp(*call, whole.model.layers[0].mlp.experts.stack())
        assert torch.equal(experts(*call), expected)


def test_a_part_has_no_full_logits_but_all_names(untrained_base):
    whole = load_model(untrained_base)
    with using(**exchanges(1, 2, whole)):
        part = load_model(untrained_base)
        for call in (
            lambda: part(IDS),
            lambda: part(IDS, labels=IDS),
            lambda: part.generate(IDS, max_new_tokens=1),
        ):
            with pytest.raises(ValueError, match=r"lm_head: .*chunk_loss\(model\).*score"):
                call()
    embedding, head = part.get_input_embeddings(), part.get_output_embeddings()
    assert type(embedding) is PartialEmbedding and type(head) is PartialHead
    assert embedding.num_embeddings == head.out_features == part.config.vocab_size == 2048
    part.tie_weights()
    assert head.weight is not embedding.weight
    with pytest.raises(TypeError, match="PartialEmbedding"):
        part.resize_token_embeddings(2056)
    told = describe_weights(part)
    assert told.endswith("only experts 4 to 7 of 8; only vocabulary rows 1024 to 2047 of 2048")
    assert "only" not in describe_weights(whole)


def test_a_count_that_does_not_divide_is_explained(untrained_base):
    with using(experts=FakeExperts(Placement(0, 3))):
        with pytest.raises(StageError, match="8 experts cannot be split evenly over 3") as caught:
            load_model(untrained_base)
    assert "expert_parallel_degree" in caught.value.fix


def damage(base: Path, folder: Path, name: str, how) -> Path:
    """Copy a checkpoint and change the shard of one tensor."""
    broken = shutil.copytree(base, folder / "broken")
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    shard = broken / index["weight_map"][name]
    how(shard, index["weight_map"])
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    return broken


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("fault", ["missing", "truncated", "fewer experts", "fewer rows"])
def test_faults_of_any_slice_are_found_by_every_rank(untrained_base, tmp_path, rank, fault):
    """Also by a rank that would not read the damaged rows."""
    rows = "lm_head.weight"
    name = rows if fault == "fewer rows" else "model.layers.2.mlp.experts.down_proj_blocks"

    def change(shard: Path, weight_map: dict) -> None:
        if fault == "truncated":
            shard.write_bytes(shard.read_bytes()[:-1])
            return
        tensors = load_file(shard)
        if fault == "missing":
            del tensors[name], weight_map[name]
        else:
            tensors[name] = tensors[name][:-1].contiguous()
        save_file(tensors, shard, {"format": "pt"})

    broken = damage(untrained_base, tmp_path, name, change)
    match = "truncated" if fault == "truncated" else name
    with using(**exchanges(rank, 4)), pytest.raises(StageError, match=match):
        load_model(broken)


def test_a_nan_scale_among_the_held_experts_is_refused(untrained_base, tmp_path):
    name = "model.layers.2.mlp.experts.down_proj_scales"

    def change(shard: Path, _weight_map: dict) -> None:
        tensors = load_file(shard)
        tensors[name][5] = 255
        save_file(tensors, shard, {"format": "pt"})

    broken = damage(untrained_base, tmp_path, name, change)
    with using(**exchanges(2, 4)), pytest.raises(StageError, match=f"{name} .*is damaged"):
        load_model(broken)


def test_a_state_dict_is_not_cut(untrained_base):
    tensors = load_model(untrained_base).state_dict()
    with using(**exchanges(0, 2)), pytest.raises(StageError, match="cannot be opened") as caught:
        GptOssForCausalLM.from_pretrained(
            None,  # pyright: ignore[reportArgumentType]
            config=packed_config(untrained_base),
            state_dict=tensors,
        )
    assert "state dict" in caught.value.found


def test_a_part_over_several_devices_is_refused(untrained_base):
    model = load_model(untrained_base)
    model.model.norm.to("meta")
    with pytest.raises(StageError, match="needs one device") as caught:
        read_withheld(model, {}, untrained_base, False)
    assert "cpu, meta" in caught.value.found


def test_experts_are_made_with_the_held_ones_only(untrained_base):
    config = packed_config(untrained_base)
    with using(**exchanges(1, 4)):
        experts = PackedExperts(config)
    assert (experts.num_experts, experts.held) == (8, range(2, 4))
    assert {len(tensor) for tensor in experts.state_dict().values()} == {2}
