"""Expert and router adapters in a whole model: gradients, loading with PEFT, baking."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from sparselong.adapters.attach import (
    ExtraAdapters,
    Masters,
    add_masked_lora,
    count_trainable,
    parameter_table,
    tuned_layers,
)
from sparselong.adapters.bake import bake_checkpoint, put_baked_experts
from sparselong.adapters.expert_lora import ExpertLora, RouterLora
from sparselong.errors import StageError
from sparselong.model.loading import load_model
from sparselong.model.packed_linear import PackedLinear
from sparselong.model.projections import stored_projections
from sparselong.packing import mxfp4
from tests.conftest import load_script

BOTH = ("gate_up_proj", "down_proj")
TOKENS = torch.arange(3, 40)[None]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stage02(small_arguments, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("experts") / "run"
    assert load_script("02_compress").main([*small_arguments, "--run-dir", str(run_dir)]) == 0
    return run_dir / "02_compress"


def tuned_model(stage02, weights=BOTH, router=True) -> PeftModel:
    masters = Masters(stage02 / "masters")
    extra = ExtraAdapters(weights, 2 if weights else None, router)
    return add_masked_lora(
        load_model(stage02 / "model", device=CPU), targets=("q_proj",), r=4, alpha=8.0,
        master_of=masters.read, seed=5, extra=extra,
    )[0]  # fmt: skip


@torch.no_grad()
def train(tuned: PeftModel, size: float) -> None:
    """Set expert Bs to random values, and router adapters so that W + s·B·A is exact in bf16."""
    torch.manual_seed(0)
    for layer in tuned_layers(tuned).values():
        if isinstance(layer, ExpertLora):
            for adapter in layer.adapters().values():
                adapter.b.normal_(std=size)
        elif isinstance(layer, RouterLora):
            a, b, scaling = layer.adapter()
            a.zero_()
            a[0, 7] = 1.0
            weight = layer.get_base_layer().weight
            wanted = (weight[:, 7] + 0.5 * torch.randn(len(weight))).bfloat16().float()
            b[:, 0] = (wanted - weight[:, 7]) / scaling


def plain_model(stage02) -> GptOssForCausalLM:
    """transformers' own model in fp32 with the decoded weights of stage 02."""
    packed = load_model(stage02 / "model", device=CPU)
    config = AutoConfig.from_pretrained(stage02 / "model")
    del config.quantization_config
    plain = GptOssForCausalLM._from_config(config, attn_implementation="eager")
    state = {}
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            state[f"{name}.weight"] = module.dequantize()
    tensors = packed.state_dict()
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            values = mxfp4.decode(tensor, tensors[f"{stem}_scales"], torch.float32)
            state[stem] = values.transpose(1, 2)
        elif name in plain.state_dict():
            state[name] = tensor
    plain = plain.float()
    plain.load_state_dict(state)
    return plain.eval()


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def test_untrained_adapters_change_no_logit_and_only_a_and_b_are_trainable(stage02):
    plain, tuned = load_model(stage02 / "model", device=CPU), tuned_model(stage02)
    assert torch.equal(logits_of(plain), logits_of(tuned))
    layers = tuned_layers(tuned)
    assert len(layers) == 12 and "model.layers.3.mlp.experts" in layers
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert len(trained) == 4 * 2 * 4 and all(".lora_" in name for name in trained)
    config = plain.config
    experts, hidden, inner = 8, config.hidden_size, config.intermediate_size
    table = {row.split()[0]: row.split() for row in parameter_table(tuned).splitlines()}
    assert table["gate_up_proj"][1] == str(4 * experts)
    assert table["gate_up_proj"][-1] == f"{4 * experts * 2 * (hidden + 2 * inner):,}"
    assert table["router"][-1] == f"{4 * 4 * (hidden + experts):,}"
    assert table["sum"][-1] == f"{count_trainable(tuned):,}"


@pytest.mark.parametrize("weights", [BOTH, ("gate_up_proj",), ("down_proj",), ()], ids="+".join)
def test_plain_peft_reads_the_saved_adapter(stage02, tmp_path, weights):
    """PEFT alone, with the adapter on decoded transformers experts, gives the same logits."""
    tuned = tuned_model(stage02, weights)
    train(tuned, 0.3)
    expected = logits_of(tuned)
    tuned.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["q_proj"]
    wanted = {*(f"mlp.experts.{name}" for name in weights), "mlp.router.weight"}
    assert set(saved["target_parameters"]) == wanted
    plain = plain_model(stage02)
    base = logits_of(plain)
    opened = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    got = logits_of(opened)
    change = (expected - base).norm()
    assert change > 0.1 * base.norm(), "the adapter's effect is too small to test"
    assert (got - expected).norm() < 1e-4 * change


def test_a_saved_adapter_is_restored_when_training_resumes(stage02, tmp_path):
    first, second = tuned_model(stage02), tuned_model(stage02)
    train(first, 0.3)
    first.save_pretrained(str(tmp_path))
    assert not torch.equal(logits_of(first), logits_of(second))
    second.load_adapter(str(tmp_path), "default", is_trainable=True)  # as the trainer resumes
    assert torch.equal(logits_of(first), logits_of(second))
    assert count_trainable(second) == count_trainable(first)


def test_every_adapter_learns_and_checkpointing_changes_no_gradient(stage02):
    tuned = tuned_model(stage02)
    train(tuned, 0.1)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            tuned.train()
            tuned.gradient_checkpointing_enable({"use_reentrant": False})
        tuned.zero_grad()
        tuned(input_ids=TOKENS, labels=TOKENS).loss.backward()
        grads.append({n: p.grad.clone() for n, p in tuned.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        assert grad.any() or "q_proj.lora_A" in name, f"{name} has no gradient"
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-7)


def test_router_gradients_match_the_formula():
    torch.manual_seed(3)
    config = type("", (), {"num_experts_per_tok": 2, "num_local_experts": 6, "hidden_size": 32})
    router = GptOssTopKRouter(config)
    router.weight.data = torch.randn(6, 32).bfloat16().float()
    router.bias.data = torch.randn(6)
    from peft import LoraConfig

    layer = RouterLora(router, "default", LoraConfig(r=3), name="router", r=3, lora_alpha=6.0)
    torch.nn.init.normal_(layer.adapter()[1], std=0.3)
    x = torch.randn(20, 32, requires_grad=True)
    logits, weights, indices = layer(x)
    upstream, upstream_weights = torch.randn_like(logits), torch.randn_like(weights)
    got = torch.autograd.grad(
        (logits, weights), (x, *layer.adapter()[:2]), (upstream, upstream_weights)
    )
    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, *layer.adapter()[:2]))
    total = router.weight.double() + 2.0 * b64 @ a64
    total = total + (layer.effective_weight().double() - total).detach()
    wanted_logits = x64 @ total.T + router.bias.double()
    wanted_weights = torch.softmax(wanted_logits.gather(1, indices), 1)
    wanted = torch.autograd.grad(
        (wanted_logits, wanted_weights), (x64, a64, b64),
        (upstream.double(), upstream_weights.double()),
    )  # fmt: skip
    assert (logits - wanted_logits).norm() < 1e-6 * wanted_logits.norm()
    for one, want in zip(got, wanted, strict=True):
        assert (one - want).norm() < 1e-5 * want.norm()


def test_a_baked_router_is_bitwise_equal_to_the_trained_one(stage02, tmp_path):
    tuned = tuned_model(stage02, weights=())
    with torch.no_grad():
        for layer in tuned_layers(tuned).values():
            layer.adapter()[1].normal_(std=0.02)
    trained = logits_of(tuned)
    baked, rounding = bake_checkpoint(stage02 / "model", tuned_layers(tuned), tmp_path / "model")
    assert rounding == {}
    assert torch.equal(logits_of(load_model(tmp_path / "model", device=CPU)), trained)
    assert len(stored_projections(baked, 0)) == 4
    assert not torch.equal(logits_of(load_model(stage02 / "model", device=CPU)), trained)


def test_baked_experts_are_the_rounded_sum_and_the_loss_is_reported(stage02, tmp_path):
    tuned = tuned_model(stage02)
    train(tuned, 0.05)
    before = copy.deepcopy(tuned_layers(tuned)["model.layers.2.mlp.experts"])
    trained = logits_of(tuned)
    layers = tuned_layers(tuned)
    baked, rounding = bake_checkpoint(stage02 / "model", layers, tmp_path / "model")
    assert torch.equal(logits_of(tuned), trained), "baking changed the model"
    assert len(rounding) == 4 and set(rounding["model.layers.0.mlp.experts"]) == set(BOTH)
    name = "model.layers.2.mlp.experts"
    for weight, adapter in before.adapters().items():
        stem = f"{name}.{weight}"
        stored = baked.read([f"{stem}_blocks", f"{stem}_scales"])
        after = mxfp4.decode(*stored.values(), torch.float32)
        packed = before.packed_experts
        old = mxfp4.decode(
            getattr(packed, f"{weight}_blocks"), getattr(packed, f"{weight}_scales"), torch.float32
        )
        change = adapter.scaling * adapter.b @ adapter.a
        told = rounding[name][weight]
        lost = (after - old - change).norm() / change.norm()
        assert told["lost"] == pytest.approx(lost.item(), rel=1e-4) and told["lost"] < 1
        assert told["relative_change"] == pytest.approx((change.norm() / old.norm()).item(), 1e-4)
        assert 0 < told["values_changed"] < 1 and 0 < told["kept"] < 1.2
    opened = logits_of(load_model(tmp_path / "model", device=CPU))
    put_baked_experts(baked, layers)
    assert torch.equal(logits_of(tuned), opened)
    assert not torch.equal(opened, trained)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (ExtraAdapters(BOTH, 2), "lora.expert_targets: the model's experts cannot have an adapter"),
        (ExtraAdapters(router=True), "lora.router: the model's router cannot have an adapter"),
    ],
)
def test_a_model_without_the_targeted_modules_is_refused(stage02, extra, message):
    model = load_model(stage02 / "model", device=CPU)
    for layer in model.model.layers:
        layer.mlp = torch.nn.ModuleDict({"router": torch.nn.Linear(8, 8)})
    with pytest.raises(StageError, match=message):
        add_masked_lora(
            model, targets=("q_proj",), r=4, alpha=8.0, seed=5, extra=extra,
            master_of=Masters(stage02 / "masters").read,
        )  # fmt: skip
