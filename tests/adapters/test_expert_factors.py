"""Adapters of a part of the experts: first values, layouts, counts, merging, whole state dicts."""

import json
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from sparselong.adapters.attach import (
    ExtraAdapters,
    Masters,
    add_masked_lora,
    count_trainable,
    parameter_table,
    tuned_layers,
)
from sparselong.adapters.bake import bake_checkpoint, put_baked_experts
from sparselong.adapters.expert_factors import (
    ExpertA,
    ExpertB,
    sharded_parameters,
    whole_state_dict,
)
from sparselong.adapters.expert_lora import ExpertLora
from sparselong.model import chunk_loss, load_model
from sparselong.runtime import using
from tests.conftest import load_script
from tests.model.exchanges import exchanges

CPU = torch.device("cpu")
EXPERTS, R = 8, 2


@pytest.fixture(scope="module")
def stage02(small_arguments, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("factors") / "run"
    assert load_script("02_compress").main([*small_arguments, "--run-dir", str(run_dir)]) == 0
    return run_dir / "02_compress"


def tuned_model(stage02, rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """Open stage 02's model as one rank of a group, with adapters."""
    with using(**(exchanges(rank, size) if size > 1 else {})):
        model = load_model(stage02 / "model", device=CPU)
    extra = ExtraAdapters(("gate_up_proj", "down_proj"), R, True, dtype)
    read = Masters(stage02 / "masters").read
    return add_masked_lora(
        model, targets=("q_proj",), r=4, alpha=8.0, master_of=read, seed=5, extra=extra
    )[0]


@torch.no_grad()
def train(tuned) -> None:
    """Set all adapters to random values."""
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if ".lora_" in name:
            parameter.normal_(std=0.1)


def gather_from(models: list) -> Any:
    """Return a gather over these ranks' models, for calls in the order of their parameters."""
    order = list(sharded_parameters(models[0]))
    calls = iter(order)

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        name = next(calls)
        parts = [sharded_parameters(model)[name].detach() for model in models]
        assert any(torch.equal(tensor, part) for part in parts)
        return torch.cat(parts)

    return gather


def share(tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Return a rank's rows of a tensor whose first dimension is experts, or experts times r."""
    return tensor.chunk(size)[rank]


@pytest.mark.parametrize("size", [2, 4])
def test_first_values_are_the_slices_of_one_process(stage02, size):
    whole = dict(tuned_model(stage02).named_parameters())
    for rank in range(size):
        tuned = tuned_model(stage02, rank, size)
        sharded = sharded_parameters(tuned)
        assert len(sharded) == 4 * 2 * 2
        for name, parameter in tuned.named_parameters():
            if ".lora_" not in name:
                continue
            expected = share(whole[name], rank, size) if name in sharded else whole[name]
            assert torch.equal(parameter, expected), name
            assert parameter.requires_grad and parameter.is_contiguous()
            assert (".experts." in name) == (name in sharded)
    assert whole["base_model.model.model.layers.1.mlp.experts.lora_A.default.weight"].any()


def test_one_expert_is_contiguous_in_both_matrices(stage02):
    tuned = tuned_model(stage02)
    assert sharded_parameters(tuned) == {}
    layer: Any = tuned_layers(tuned)["model.layers.0.mlp.experts"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (EXPERTS * R, 128) and b.shape == (EXPERTS, 128, R)
    adapter = layer.adapter()
    assert adapter.a.data_ptr() == a.data_ptr() and adapter.b.data_ptr() == b.data_ptr()
    assert adapter.a[0].is_contiguous() and adapter.b[0].is_contiguous()


def test_the_state_dict_is_in_pefts_layout(stage02):
    """B's column of rank k and expert e is k * experts + e, as PEFT's `target_parameters` has."""
    tuned = tuned_model(stage02)
    train(tuned)
    state = get_peft_model_state_dict(tuned)
    layer: Any = tuned_layers(tuned)["model.layers.2.mlp.experts"]
    saved = state["base_model.model.model.layers.2.mlp.experts.lora_B.weight"]
    assert saved.shape == (128, R * EXPERTS)
    for k in range(R):
        for expert in range(EXPERTS):
            assert torch.equal(saved[:, k * EXPERTS + expert], layer.adapter().b[expert, :, k])
    other = tuned_model(stage02)
    set_peft_model_state_dict(other, state)
    for (name, one), two in zip(tuned.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("size", [2, 4])
def test_parts_load_from_and_save_to_the_whole_adapter(stage02, tmp_path, size):
    whole = tuned_model(stage02)
    train(whole)
    whole.save_pretrained(str(tmp_path / "one"))
    parts = [tuned_model(stage02, rank, size) for rank in range(size)]
    for rank, part in enumerate(parts):
        part.load_adapter(str(tmp_path / "one"), "default", is_trainable=True)
        for name, parameter in sharded_parameters(part).items():
            assert torch.equal(parameter, share(dict(whole.named_parameters())[name], rank, size))
    last = parts[-1]
    last.save_pretrained(
        str(tmp_path / "again"), state_dict=whole_state_dict(last, gather_from(parts))
    )
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        one, again = ((tmp_path / folder / file).read_bytes() for folder in ("one", "again"))
        if file.endswith("json"):
            one, again = json.loads(one), json.loads(again)
            for config in (one, again):
                config["target_modules"] = sorted(config["target_modules"])
        assert one == again, file


def test_a_part_loads_its_own_state_dict(stage02):
    one, other = tuned_model(stage02, 1, 4), tuned_model(stage02, 1, 4)
    train(one)
    set_peft_model_state_dict(other, get_peft_model_state_dict(one))
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", [ExpertA, ExpertB])
def test_a_matrix_of_another_number_of_experts_is_refused(kind):
    whole = torch.randn(EXPERTS * R, 6) if kind is ExpertA else torch.randn(6, EXPERTS * R)
    factor = kind(whole, range(2, 4), EXPERTS)
    wrong = whole[: 3 * R] if kind is ExpertA else whole[:, : 3 * R]
    with pytest.raises(RuntimeError, match="size mismatch"):
        factor.load_state_dict({"weight": wrong})


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_held_experts_are_the_slices_of_the_whole(stage02, checkpointed):
    """The adapters of other ranks' experts change nothing, since their B is zero."""
    base = load_model(stage02 / "model", device=CPU)
    ids = torch.arange(3, 40)[None]
    for rank in range(2):
        whole, part = tuned_model(stage02), tuned_model(stage02, rank, 2)
        train(whole)
        kept = share(torch.arange(EXPERTS), rank, 2)
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                if ".experts." in name and "lora_B" in name:
                    parameter[[e for e in range(EXPERTS) if e not in kept]] = 0
        set_peft_model_state_dict(part, get_peft_model_state_dict(whole))
        losses = []
        for model, settings in ((whole, {}), (part, exchanges(rank, 2, base))):
            chunk_loss(model.get_base_model())
            model.train()
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            with using(**settings):
                losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss)
                losses[-1].backward()
        assert torch.equal(*losses)
        sharded, gradients = sharded_parameters(part), dict(whole.named_parameters())
        for name, parameter in part.named_parameters():
            if not parameter.requires_grad:
                continue
            expected = gradients[name].grad
            expected = share(expected, rank, 2) if name in sharded else expected
            assert expected.any() or "down_proj" in name, name
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-9)


def test_counts_are_those_of_the_whole_model(stage02):
    whole, part = tuned_model(stage02), tuned_model(stage02, 3, 4)
    assert count_trainable(part) == count_trainable(whole)
    assert parameter_table(part) == parameter_table(whole)
    held = sum(p.numel() for p in part.parameters() if p.requires_grad)
    assert held < count_trainable(part)


def test_merging_gives_the_slices_of_the_whole(stage02, tmp_path):
    whole, parts = tuned_model(stage02), [tuned_model(stage02, rank, 2) for rank in range(2)]
    train(whole)
    for part in parts:
        set_peft_model_state_dict(part, get_peft_model_state_dict(whole))
    baked, _ = bake_checkpoint(stage02 / "model", tuned_layers(whole), tmp_path / "model")
    for name, layer in tuned_layers(whole).items():
        if not isinstance(layer, ExpertLora):
            continue
        layers: list[Any] = [tuned_layers(part)[name] for part in parts]
        merged = [part.merge_packed().tensors for part in layers]
        for tensor, expected in layer.merge_packed().tensors.items():
            assert torch.equal(torch.cat([each[tensor] for each in merged]), expected)
    for rank, part in enumerate(parts):
        put_baked_experts(baked, tuned_layers(part))
        experts: Any = tuned_layers(part)["model.layers.3.mlp.experts"]
        stored = baked.read(["model.layers.3.mlp.experts.down_proj_blocks"]).popitem()[1]
        assert torch.equal(experts.packed_experts.down_proj_blocks, share(stored, rank, 2))


def test_adapters_in_bfloat16_have_the_rounded_gradients_of_float32(stage02):
    """Sums over rows are in fp32 and rounded once; the adapters of other layers stay in fp32."""
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        tuned = tuned_model(stage02, dtype=dtype)
        train(tuned)
        trained = {n: p for n, p in tuned.named_parameters() if ".lora_" in n}
        kinds = {n: p.dtype for n, p in trained.items()}
        assert {kind for n, kind in kinds.items() if "experts" in n} == {dtype}
        assert {kind for n, kind in kinds.items() if "experts" not in n} == {torch.float32}
        experts = tuned.base_model.model.model.layers[0].mlp.experts
        factors = dict(experts.named_parameters())
        with torch.no_grad():
            for factor in factors.values():
                factor.copy_(factor.bfloat16())  # the same values in both types
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(20, 128, generator=generator)
        indices = torch.rand(20, EXPERTS, generator=generator).argsort(1)[:, :4]
        out = experts(x, indices, torch.rand(20, 4, generator=generator))
        out.backward(torch.randn(out.shape, generator=generator))
        grads.append({n: p.grad for n, p in factors.items() if ".weight" in n and "lora_" in n})
    exact, rounded = grads
    assert len(exact) == 4 and exact.keys() == rounded.keys()
    for name, grad in exact.items():
        assert rounded[name].dtype == torch.bfloat16
        assert torch.equal(rounded[name], grad.bfloat16()), name
