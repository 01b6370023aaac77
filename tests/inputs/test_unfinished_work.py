"""Files that a stage has finished, changed before it published them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparselong import provenance
from sparselong.compress import stream
from sparselong.compress.background import Seconds
from sparselong.compress.calibration import HiddenStates
from sparselong.compress.layers import LayerStream
from sparselong.compress.work import Spread
from sparselong.config import load
from sparselong.errors import StageError
from sparselong.finetune import trainer
from sparselong.run import Stage
from tests.conftest import ROOT


def flip(path: Path) -> None:
    """Change a byte at a file's end, and its time."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def stop_before(owner: Any, name: str, count: int) -> Callable:
    """Return a function that is interrupted when it is called for the given time."""
    original, calls = getattr(owner, name), []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return original(*arguments)

    return stop


@pytest.mark.parametrize(
    ("moment", "count", "names"),
    [
        (
            "compress",
            4,
            ("model.partial/dense-00000.safetensors", "masters/layer-00001.safetensors"),
        ),
        ("_complete", 1, ("model.partial/dense-00003.safetensors",)),
        (
            "_publish",
            1,
            ("model/dense-00003.safetensors", "model/tokenizer.json", "model/config.json"),
        ),
    ],
)
def test_stage_02_refuses_a_finished_file_that_has_changed(
    run_script, monkeypatch, tmp_path, moment, count, names
):
    with monkeypatch.context() as patch:
        owner = LayerStream if moment == "compress" else stream
        patch.setattr(owner, moment, stop_before(owner, moment, count))
        assert run_script("02_compress").code == 1
    for name in names:
        path = tmp_path / "run/02_compress" / name
        flip(path)
        run_script("02_compress").assert_explained(
            f"{path} has changed since 02_compress recorded it", "sha256", "--force"
        )
        flip(path)  # as it was, but for its time
    assert run_script("02_compress").code == 0


def test_stage_02_reads_its_finished_files_once(run_script, monkeypatch, tmp_path):
    """The 120b's have 65 GB, most of them linked to the base."""
    original, read = provenance.hash_file, []
    monkeypatch.setattr(
        provenance, "hash_file", lambda p: read.append(p.stat().st_ino) or original(p)
    )
    assert run_script("02_compress").code == 0
    monkeypatch.undo()
    folder = tmp_path / "run/02_compress"
    ours = [p.stat().st_ino for part in ("model", "masters") for p in (folder / part).iterdir()]
    assert {read.count(inode) for inode in ours} == {1}


def test_changed_states_of_stage_02_are_explained(tmp_path):
    path, nothing = tmp_path / "states.safetensors", SimpleNamespace()

    def open_states(spread=None) -> HiddenStates:
        size, device = (5, 3, 4), torch.device("cpu")
        return HiddenStates(path, size, torch.bfloat16, device, 6, spread or Spread())

    saved = open_states()
    saved.put(slice(0, 5), torch.arange(60.0).reshape(5, 3, 4))
    saved.advance()
    saved.begin_saving()
    saved.save(Seconds())
    assert not path.exists()
    saved.commit()
    for rank, rows in ((None, slice(0, 5)), (0, slice(0, 2)), (1, slice(2, 5))):
        spread = Spread()
        if rank is not None:  # batches of two, two and one sequences
            spread.rank, spread.size = rank, 2
        again = open_states(spread)
        again.start(nothing, nothing)  # type: ignore[arg-type]
        assert again.layers_done == 1 and torch.equal(again.states, saved.states[rows])
    raw = path.read_bytes()
    last = saved.states[4].view(torch.uint8).numpy().tobytes()
    path.write_bytes(raw.replace(last, b"\x01" * len(last)))
    with pytest.raises(StageError, match=r"(?s)is damaged.*sha256.*first layer"):
        open_states().start(nothing, nothing)  # type: ignore[arg-type]


def test_a_layers_states_are_saved_even_if_the_next_layer_is_done_before(tmp_path):
    """The thread that saves them also writes and hashes the layer, which may take longer."""
    path, nothing = tmp_path / "states.safetensors", SimpleNamespace()
    size, device = (2, 3, 4), torch.device("cpu")
    states = HiddenStates(path, size, torch.bfloat16, device, 6, Spread())
    for layer in (1, 2):
        states.put(slice(0, 2), torch.full(size, float(layer)))
        states.advance()
        if layer == 1:
            states.begin_saving()
    states.save(Seconds())
    states.commit()
    again = HiddenStates(path, size, torch.bfloat16, device, 6, Spread())
    again.start(nothing, nothing)  # type: ignore[arg-type]
    assert again.layers_done == 1 and bool((again.states == 1).all())


@pytest.mark.parametrize("name", ["model/dense.safetensors", "adapter/adapter_model.safetensors"])
def test_stage_03_refuses_a_result_that_has_changed_since_it_was_baked(tmp_path, monkeypatch, name):
    stage = Stage("03_finetune", load(ROOT / "configs/tiny.yaml"), tmp_path)
    path = stage.dir / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"baked")
    figures = ("mask_updates", "best_step", "steps", "best_eval_loss", "two_four_conforming")
    baked = dict.fromkeys(figures, 1) | {"best_checkpoint": "checkpoint-2"}
    baked |= {"peak_bytes": {"host": 1}, "files": provenance.describe_files([path], tmp_path)}
    (stage.dir / "baked.json").write_text(json.dumps(baked))
    keys = ("keep_attention", "keep_experts", "trainable_parameters", "supervised_token_fraction")
    monkeypatch.setattr(trainer, "check_receipt", lambda *_: dict.fromkeys(keys, 1))
    monkeypatch.setattr(trainer.plot, "draw", lambda *_: None)
    flip(path)
    with pytest.raises(StageError, match="has changed since 03_finetune recorded it") as failure:
        trainer._publish(stage)
    assert "baked.json" in failure.value.fix and "--force" not in failure.value.fix
    flip(path)
    os.utime(path, ns=(1, 1))
    trainer._publish(stage)
    assert stage.described == baked["files"]


def test_a_record_of_stage_03_with_other_rows_is_explained(tmp_path, monkeypatch):
    stage = Stage("03_finetune", load(ROOT / "configs/tiny.yaml"), tmp_path)
    stage.dir.mkdir()
    monkeypatch.setattr(trainer, "check_receipt", lambda *_: {})
    for files in (3, [3], [{"path": "x"}], {"path": "x"}):
        baked = dict.fromkeys(trainer._BAKED, 1) | {"files": files}
        (stage.dir / "baked.json").write_text(json.dumps(baked))
        with pytest.raises(StageError, match=r"(?s)baked.json is damaged.*no valid files"):
            trainer._publish(stage)
