"""02_compress as a person runs it: what it leaves, how it resumes, what it refuses."""

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparselong  # noqa: F401  registers the packed format with transformers
from tests.conftest import ROOT, load_script, write_rows

compress_script = load_script("02_compress")


def run(run_dir: Path, arguments: list[str], *more: str) -> int:
    return compress_script.main([*arguments, "--run-dir", str(run_dir), *more])


@pytest.fixture(scope="module")
def done(tmp_path_factory, small_arguments) -> Path:
    """A finished stage 02 on the untrained model."""
    run_dir = tmp_path_factory.mktemp("compress") / "run"
    assert run(run_dir, small_arguments) == 0
    return run_dir


@pytest.fixture(scope="module")
def metrics(done) -> dict:
    return json.loads((done / "02_compress/manifest.json").read_text())["metrics"]


def test_manifest_publishes_what_the_contract_promises(metrics):
    assert metrics["experts_bit_exact"] is True
    assert metrics["two_four_conforming"] == 1.0
    assert metrics["masters_match"] is True
    assert metrics["bits_per_weight"]["experts"] < 4.35  # 4.25 and biases
    assert metrics["bits_per_weight"]["attention"] < 3.1  # 3.0 and biases and sinks
    assert metrics["bytes_on_disk"] < metrics["base_bytes_on_disk"]
    assert 0 < metrics["bytes_linked"] < metrics["bytes_on_disk"]
    assert metrics["peak_host_bytes"] > 0 and len(metrics["relative_error"]) == 4
    assert metrics["name"] == "base-w4a16-experts-4bit-2of4"


def test_files_really_are_smaller_and_linked(done, untrained_base):
    def total(folder):
        return sum(p.stat().st_size for p in folder.glob("*.safetensors"))

    model = done / "02_compress/model"
    assert total(model) < total(untrained_base)
    linked = [p for p in model.glob("model-*.safetensors") if p.stat().st_nlink > 1]
    assert linked and all(p.samefile(untrained_base / p.name) for p in linked)
    assert (done / "02_compress/base-w4a16-experts-4bit-2of4").resolve() == model.resolve()


def test_plain_transformers_opens_it_with_the_same_bits(done):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        done / "02_compress/model", output_loading_info=True
    )
    assert not any(info.values())
    stored = {}
    for path in (done / "02_compress/model").glob("*.safetensors"):
        stored |= load_file(path)
    state = model.state_dict()
    assert set(state) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(state[name].to(tensor.dtype), tensor), name
    again = AutoModelForCausalLM.from_pretrained(done / "02_compress/model")
    tokens = torch.randint(0, 2000, (2, 80))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_stored_weights_are_those_calibration_ended_with(done, small_arguments, tmp_path):
    """The logits of the opened model follow from the states that streaming computed in memory."""
    from sparselong.compress import stream
    from sparselong.model.loading import load_model

    kept = {}
    original = stream.HiddenStates.save

    def save(self, layers_done):
        kept["states"] = self.states
        original(self, layers_done)

    stream.HiddenStates.save = save
    try:
        assert run(tmp_path / "run", small_arguments) == 0
    finally:
        stream.HiddenStates.save = original
    model = load_model(tmp_path / "run/02_compress/model")
    from sparselong.compress.calibration import calibration_tokens
    from sparselong.config import load
    from sparselong.model.loading import load_tokenizer

    overrides = [a for a in small_arguments if "=" in a]
    config = load(small_arguments[1], overrides)
    tokens = calibration_tokens(config, tmp_path / "run", load_tokenizer(model.name_or_path))
    with torch.no_grad():
        inner = model.model(tokens, output_hidden_states=True)
    assert torch.equal(inner.last_hidden_state, model.model.norm(kept["states"]))


def test_masters_keep_what_was_pruned(done, untrained_base):
    from sparselong.packing import dense
    from sparselong.packing.dense import DenseFormat

    fmt = DenseFormat(4, "2:4", 64)
    base = {}
    for path in untrained_base.glob("*.safetensors"):
        base |= load_file(path)
    name = "model.layers.2.self_attn.v_proj"
    packed = load_file(done / "02_compress/model/dense-00002.safetensors")
    tensors = {k.removeprefix(f"{name}."): v for k, v in packed.items() if k.startswith(name)}
    mask = dense.unpack_mask(fmt, tensors)
    master = load_file(done / "02_compress/masters/layer-00002.safetensors")[f"{name}.weight"]
    original = base[f"{name}.weight"]
    assert torch.equal(master[~mask], original[~mask])
    assert not torch.equal(master[mask], original[mask])


def start_and_signal(run_dir: Path, arguments: list[str], number: int) -> tuple[int, str]:
    """Starts the script, signals it once its second layer is done; exit code and stderr."""
    command = [sys.executable, str(ROOT / "02_compress.py"), *arguments, "--run-dir", str(run_dir)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    marker = run_dir / "02_compress/work/layer-00001.json"
    deadline = time.monotonic() + 120
    while not marker.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait(), process.stderr.read() if process.stderr else ""


def assert_same_result(ours: Path, clean: Path) -> None:
    for folder in ("model", "masters"):
        left, right = ours / "02_compress" / folder, clean / "02_compress" / folder
        files = sorted(p.name for p in right.iterdir())
        assert files == sorted(p.name for p in left.iterdir())
        _, different, errors = filecmp.cmpfiles(left, right, files, shallow=False)
        assert different == errors == []


@pytest.fixture(scope="module")
def deep(tmp_path_factory, untrained_base, small_arguments) -> tuple[list[str], Path]:
    """Thirty layers, which take long enough to be stopped on the way: arguments, finished run."""
    folder = tmp_path_factory.mktemp("deep")
    base = stretch(untrained_base, folder / "base", 30)
    arguments = [*small_arguments, f"model.base={base}"]
    assert run(folder / "run", arguments) == 0
    return arguments, folder / "run"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_stopped_and_restarted_it_ends_in_the_same_bytes(deep, tmp_path, number):
    arguments, clean = deep
    run_dir = tmp_path / "run"
    code, shown = start_and_signal(run_dir, arguments, number)
    if number == signal.SIGINT:
        assert code == 1 and "error:    02_compress was interrupted" in shown
    assert not (run_dir / "02_compress/manifest.json").exists()
    assert not (run_dir / "02_compress/model").exists()
    first = run_dir / "02_compress/model.partial/dense-00000.safetensors"
    written = first.stat().st_mtime_ns
    assert run(run_dir, arguments) == 0
    first = run_dir / "02_compress/model/dense-00000.safetensors"
    assert first.stat().st_mtime_ns == written, "finished layers are not done again"
    assert_same_result(run_dir, clean)


@pytest.mark.parametrize("moment", ["take_over", "derive", "measure", "HiddenStates.save"])
def test_stopped_at_any_moment(done, small_arguments, tmp_path, monkeypatch, moment):
    """While a layer, the shards, the index or the figures are being written."""
    from sparselong.compress import stream
    from sparselong.model import checkpoint

    owner = checkpoint if moment == "take_over" else stream
    owner, name = (stream.HiddenStates, "save") if "." in moment else (owner, moment)
    original, calls = getattr(owner, name), []

    def stop(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 2 or moment in ("derive", "measure"):
            raise KeyboardInterrupt
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        assert run(tmp_path / "run", small_arguments) == 1
    assert not (tmp_path / "run/02_compress/manifest.json").exists()
    assert run(tmp_path / "run", small_arguments) == 0
    assert_same_result(tmp_path / "run", done)


def test_malformed_rows_are_named_by_line(small_arguments, tmp_path, capsys):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for bad, part in (
        ({"messages": "no"}, "messages"),
        ({"messages": good["messages"][:1]}, "assistant"),
    ):
        data = write_rows(tmp_path / "data.jsonl", [good, good, bad])
        assert run(tmp_path / f"run-{part}", [*small_arguments, f"data.train={data}"]) == 1
        shown = capsys.readouterr().err
        assert "line 3" in shown and part in shown


@pytest.mark.parametrize(
    ("overrides", "attention_bits", "conforming"),
    [
        (["shared_dense.weight_bits=8"], 5.0, 1.0),
        (["shared_dense.weight_bits=16"], 8.75, 1.0),
        (["shared_dense.sparsity=none"], 4.25, None),
        (["shared_dense.weight_bits=16", "shared_dense.sparsity=none"], 16.0, None),
    ],
)
def test_every_storage_opens(small_arguments, tmp_path, overrides, attention_bits, conforming):
    from sparselong.model.loading import load_model

    assert run(tmp_path / "run", [*small_arguments, *overrides]) == 0
    metrics = json.loads((tmp_path / "run/02_compress/manifest.json").read_text())["metrics"]
    assert abs(metrics["bits_per_weight"]["attention"] - attention_bits) < 0.1
    if conforming is None:
        assert metrics["two_four_conforming"] < 0.5
    else:
        assert metrics["two_four_conforming"] == conforming
    assert torch.isfinite(
        load_model(tmp_path / "run/02_compress/model")(torch.tensor([[1, 2]])).logits
    ).all()


def test_two_four_experts_are_stored_small_and_open(small_arguments, tmp_path, untrained_base):
    from sparselong.model.loading import load_model
    from sparselong.packing import mxfp4, two_four

    assert run(tmp_path / "run", [*small_arguments, "experts.sparsity=2:4"]) == 0
    metrics = json.loads((tmp_path / "run/02_compress/manifest.json").read_text())["metrics"]
    assert metrics["bits_per_weight"]["experts"] < 3.15  # 3.0 and biases
    assert metrics["experts_bit_exact"] is False
    model, base = load_model(tmp_path / "run/02_compress/model"), load_model(untrained_base)
    pruned, whole = (
        mxfp4.unpack_codes(m.model.layers[3].mlp.experts.down_proj_blocks) for m in (model, base)
    )
    assert bool(two_four.is_two_four((pruned & 7) != 0).all())
    assert bool(((pruned == whole) | (pruned == 0)).all())


def stretch(base: Path, folder: Path, layers: int) -> Path:
    """The base's layers over and over, as a deeper model of one shard per layer."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*", "tiny.json"))
    tensors = {}
    for path in base.glob("*.safetensors"):
        tensors |= load_file(path)
    config = json.loads((base / "config.json").read_text())
    period, weight_map = config["num_hidden_layers"], {}
    shards = [{k: v for k, v in tensors.items() if ".layers." not in k}]
    for layer in range(layers):
        prefix = f"model.layers.{layer % period}."
        shards.append(
            {
                k.replace(prefix, f"model.layers.{layer}."): v.clone()
                for k, v in tensors.items()
                if k.startswith(prefix)
            }
        )
    for number, shard in enumerate(shards):
        name = f"model-{number:05d}-of-{layers:05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    config["layer_types"] = [config["layer_types"][layer % period] for layer in range(layers)]
    config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_peak_memory_does_not_grow_with_layers(tmp_path, small_arguments):
    """Twelve more layers are 80 MB more of experts; the peak may not follow.

    Each run is a process of its own: what an allocator keeps of runs before would count, too.
    """
    from sparselong.model.tiny import TinySpec, build_tiny

    spec = TinySpec(layers=2, hidden=256, intermediate=1024, experts=16, steps=0)
    base, peaks = build_tiny(tmp_path / "base", spec, seed=1), []
    for layers in (2, 14):
        deep = stretch(base, tmp_path / f"deep{len(peaks)}", layers)
        run_dir = tmp_path / f"run{len(peaks)}"
        arguments = [*small_arguments, f"model.base={deep}", "calibration.samples=4"]
        command = [sys.executable, "02_compress.py", *arguments, "--run-dir", str(run_dir)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        metrics = json.loads((run_dir / "02_compress/manifest.json").read_text())["metrics"]
        assert metrics["base_bytes_on_disk"] > layers * 6_500_000
        peaks.append(metrics["peak_host_bytes"])
    assert peaks[1] - peaks[0] < 30_000_000, peaks


def test_mixed_shards_are_linked_when_little_of_them_is_replaced(tmp_path, small_arguments):
    """As on the published 120b: attention is under 5 % of every shard, and nothing is copied."""
    from transformers import AutoModelForCausalLM

    from sparselong.model.tiny import TinySpec, build_tiny

    spec = TinySpec(layers=1, intermediate=1024, experts=48, steps=0)
    base = stretch(build_tiny(tmp_path / "one", spec, seed=1), tmp_path / "base", 2)
    run_dir = tmp_path / "run"
    assert run(run_dir, [*small_arguments, f"model.base={base}"]) == 0
    model = run_dir / "02_compress/model"
    for number in (1, 2):
        name = f"model-{number:05d}-of-00002.safetensors"
        assert (model / name).samefile(base / name)
    metrics = json.loads((run_dir / "02_compress/manifest.json").read_text())["metrics"]
    assert metrics["bytes_on_disk"] < metrics["base_bytes_on_disk"]
    assert metrics["bytes_linked"] < metrics["bytes_on_disk"]
    loaded, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not any(info.values())
    packed = load_file(model / "dense-00001.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight_packed"
    assert torch.equal(loaded.state_dict()[name], packed[name])


def test_a_shard_that_carries_an_old_version_is_never_linked(untrained_base, tmp_path):
    """transformers would read both versions, and the last file name would win."""
    from sparselong.model.checkpoint import Checkpoint, derive, write_tensors

    base = Checkpoint(untrained_base)
    name = "model.layers.0.self_attn.sinks"
    tensors = base.read([name])
    write_tensors(tmp_path / "aaa.safetensors", {name: tensors[name] + 1})
    made = derive(base, tmp_path, {name}, [tmp_path / "aaa.safetensors"], {})
    assert torch.equal(made.read([name])[name], tensors[name] + 1)
    holders = [p.name for p in tmp_path.glob("*.safetensors") if name in load_file(p)]
    assert holders == ["aaa.safetensors"]


def damage(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "damaged")


def edit_tensors(folder: Path, name: str, change) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    tensors = {k: v.clone() for k, v in tensors.items()}
    tensors[name] = change(tensors[name])
    save_file(tensors, path, {"format": "pt"})


def edit_json(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[0]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)


def nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = float("nan")
    return tensor


Q0 = "model.layers.0.self_attn.q_proj.weight"
DAMAGES = {
    "truncated shard": (truncate, "truncated"),
    "unreadable shard": (
        lambda f: sorted(f.glob("model-*"))[0].write_bytes(b"not a tensor file"),
        "header that is not safetensors'",
    ),
    "shard gone": (lambda f: sorted(f.glob("model-*.safetensors"))[1].unlink(), "is missing"),
    "shard not in the index": (
        lambda f: edit_json(
            f / "model.safetensors.index.json",
            lambda d: d.update(
                weight_map={
                    k: v for k, v in d["weight_map"].items() if v != max(d["weight_map"].values())
                }
            ),
        ),
        "does not name",
    ),
    "not gpt-oss": (
        lambda f: edit_json(f / "config.json", lambda d: d.update(model_type="llama")),
        "model_type 'llama'",
    ),
    "compressed already": (
        lambda f: edit_json(
            f / "config.json",
            lambda d: d.update(quantization_config={"quant_method": "sparselong"}),
        ),
        "compressed already",
    ),
    "not MXFP4": (
        lambda f: edit_json(f / "config.json", lambda d: d.pop("quantization_config")),
        "quant_method None",
    ),
    "wrong shape": (
        lambda f: edit_tensors(f, Q0, lambda t: t[:, :-32].contiguous()),
        "not as config.json says",
    ),
    "NaN weights": (lambda f: edit_tensors(f, Q0, nan), "1 NaN or infinite values"),
    "NaN in lm_head": (lambda f: edit_tensors(f, "lm_head.weight", nan), "1 NaN or infinite"),
    "NaN in a norm": (
        lambda f: edit_tensors(f, "model.norm.weight", lambda t: t * float("nan")),
        "NaN or infinite values",
    ),
    "NaN scale of an expert": (
        lambda f: edit_tensors(
            f, "model.layers.3.mlp.experts.down_proj_scales", lambda t: t.fill_(255)
        ),
        "down_proj_scales",
    ),
    "index without weight_map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "is not an index",
    ),
    "weight_map of numbers": (
        lambda f: edit_json(
            f / "model.safetensors.index.json", lambda d: d.update(weight_map={"a": 1})
        ),
        "is not an index",
    ),
    "config.json a list": (lambda f: (f / "config.json").write_text("[]"), "found:    list"),
    "config.json nonsense": (
        lambda f: edit_json(f / "config.json", lambda d: d.update(layer_types=["square"] * 4)),
        "does not describe a gpt-oss",
    ),
    "tokenizer gone": (
        lambda f: [p.unlink() for p in f.glob("*token*.json")],
        "the tokenizer of",
    ),
    "config.json gone": (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_checkpoints_are_refused(untrained_base, small_arguments, tmp_path, capsys, case):
    change, message = DAMAGES[case]
    folder = damage(untrained_base, tmp_path)
    change(folder)
    assert run(tmp_path / "run", [*small_arguments, f"model.base={folder}"]) == 1
    err = capsys.readouterr().err
    assert message in err and "\nfix: " in err
    assert not (tmp_path / "run/02_compress/manifest.json").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        (
            [
                {
                    "messages": [
                        {"role": "user", "content": "a"},
                        {"role": "assistant", "content": "b"},
                    ]
                }
            ]
            * 2,
            "shorter than one sequence",
        ),
    ],
)
def test_calibration_data_that_does_not_suffice(small_arguments, tmp_path, capsys, rows, message):
    data = write_rows(tmp_path / "data.jsonl", rows)
    arguments = [*small_arguments, f"data.train={data}", f"data.validation={data}"]
    assert run(tmp_path / "run", [*arguments, "calibration.sequence_len=512"]) == 1
    assert message in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_that_looks_done(
    done, small_arguments, tmp_path, capsys, monkeypatch
):
    import errno

    real, written = os.fsync, []

    def fsync(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert run(tmp_path / "run", small_arguments) == 1
    assert "room on the disk" in capsys.readouterr().err
    assert not (tmp_path / "run/02_compress/model").exists()
    monkeypatch.undo()
    assert run(tmp_path / "run", small_arguments) == 0
    for name in ("dense-00000.safetensors", "dense-00003.safetensors"):
        ours, clean = (r / "02_compress/model" / name for r in (tmp_path / "run", done))
        assert filecmp.cmp(ours, clean, shallow=False)


def test_dry_run_plans_and_touches_nothing(small_arguments, tmp_path, capsys):
    assert run(tmp_path / "run", small_arguments, "--dry-run") == 0
    assert "02_compress" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
