"""02_compress interrupted and resumed, on a full disk, and its refusals."""

import filecmp
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT, write_rows
from tests.stages.conftest import run, stretch


def start_and_signal(
    python: str, run_dir: Path, arguments: list[str], number: int, layer: int
) -> tuple[int, str]:
    """Signal the script after a layer and return its exit code and stderr."""
    command = [python, str(ROOT / "02_compress.py"), *arguments, "--run-dir", str(run_dir)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    marker = run_dir / f"02_compress/work/layer-{layer:05d}.json"
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
    """Ten layers, long enough to interrupt: arguments and the finished run."""
    folder = tmp_path_factory.mktemp("deep")
    base = stretch(untrained_base, folder / "base", 10)
    arguments = [*small_arguments, f"model.base={base}"]
    assert run(folder / "run", arguments) == 0
    return arguments, folder / "run"


def test_a_run_that_is_killed_and_then_interrupted_gives_the_same_bytes(
    deep, tmp_path, forked_python
):
    """Only the second run is Python itself: Ctrl-C is a signal that it handles."""
    arguments, clean = deep
    run_dir = tmp_path / "run"
    first = Path("dense-00000.safetensors")
    code, _ = start_and_signal(forked_python, run_dir, arguments, signal.SIGKILL, layer=1)
    assert code == -signal.SIGKILL
    assert_unfinished(run_dir)
    written = (run_dir / "02_compress/model.partial" / first).stat().st_mtime_ns
    code, shown = start_and_signal(sys.executable, run_dir, arguments, signal.SIGINT, layer=5)
    assert code == 1 and "error:    02_compress was interrupted" in shown
    assert_unfinished(run_dir)
    assert run(run_dir, arguments) == 0
    found = (run_dir / "02_compress/model" / first).stat().st_mtime_ns
    assert found == written, "finished layers must not be repeated"
    assert_same_result(run_dir, clean)


def assert_unfinished(run_dir: Path) -> None:
    assert not (run_dir / "02_compress/manifest.json").exists()
    assert not (run_dir / "02_compress/model").exists()


MOMENTS = (
    *("LayerReader._read", "write_tensors", "write_atomically", "HiddenStates.save"),
    *("HiddenStates.commit", "take_over", "derive", "measure"),
)


def test_interruption_at_any_moment(compressed_run, small_arguments, tmp_path, monkeypatch):
    """One run, interrupted while layers, the shards, the index and the figures are written."""
    from sparselong.checkpoint import derivation
    from sparselong.compress import layers, stream

    owners = {"take_over": derivation, "write_tensors": layers, "write_atomically": layers}
    for moment in MOMENTS:
        kind, _, name = moment.rpartition(".")
        owner = getattr(layers, kind) if kind else owners.get(moment, stream)
        stop = stop_at(1 if moment in ("derive", "measure") else 2, getattr(owner, name))
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            assert run(tmp_path / "run", small_arguments) == 1, moment
        assert not (tmp_path / "run/02_compress/manifest.json").exists()
    assert run(tmp_path / "run", small_arguments) == 0
    assert_same_result(tmp_path / "run", compressed_run)


def stop_at(number: int, original: Callable) -> Callable:
    """Return a function whose call of that number is interrupted."""
    calls = itertools.count(1)

    def stop(*arguments, **keywords):
        if next(calls) == number:
            raise KeyboardInterrupt
        return original(*arguments, **keywords)

    return stop


def test_a_full_disk_leaves_nothing_that_looks_complete(
    compressed_run, small_arguments, tmp_path, capsys, monkeypatch
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
    assert "free disk space" in capsys.readouterr().err
    assert not (tmp_path / "run/02_compress/model").exists()
    monkeypatch.undo()
    assert run(tmp_path / "run", small_arguments) == 0
    for name in ("dense-00000.safetensors", "dense-00003.safetensors"):
        ours, clean = (r / "02_compress/model" / name for r in (tmp_path / "run", compressed_run))
        assert filecmp.cmp(ours, clean, shallow=False)


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
        "header that is not in safetensors format",
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
        "already compressed",
    ),
    "not MXFP4": (
        lambda f: edit_json(f / "config.json", lambda d: d.pop("quantization_config")),
        "quant_method None",
    ),
    "wrong shape": (
        lambda f: edit_tensors(f, Q0, lambda t: t[:, :-32].contiguous()),
        "does not match config.json",
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
    "config.json a list": (lambda f: (f / "config.json").write_text("[]"), "found:    a JSON list"),
    "config.json nonsense": (
        lambda f: edit_json(f / "config.json", lambda d: d.update(layer_types=["square"] * 4)),
        "does not describe a gpt-oss model",
    ),
    "tokenizer gone": (
        lambda f: [p.unlink() for p in f.glob("*token*.json")],
        "tokenizer.json cannot be read",
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
def test_insufficient_calibration_data_is_refused(small_arguments, tmp_path, capsys, rows, message):
    data = write_rows(tmp_path / "data.jsonl", rows)
    arguments = [*small_arguments, f"data.train={data}", f"data.validation={data}"]
    assert run(tmp_path / "run", [*arguments, "calibration.sequence_len=512"]) == 1
    assert message in capsys.readouterr().err
