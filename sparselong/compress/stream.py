"""Stage 02 as a stream: read, calibrate, compress and write one layer, free it, then take the next.

At most one layer and the calibration states are in memory. After each layer, its packed tensors,
its masters and the states are written in this order, each file atomically. If the process is killed
at any moment, the next run resumes after the last layer whose states were saved and recomputes the
layers after it to the same bytes.

    02_compress/model.partial/     grows; renamed to model/ when complete
    02_compress/masters/           dense bf16 masters by layer, for stage 03
    02_compress/work/              states (removed at the end), per-layer records with the hashes of
                                   the layer's files, model.json with those of the whole model
    02_compress/base.json          sizes, times and hashes of the base's files
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig

from sparselong.checkpoint import (
    Checkpoint,
    check_recorded,
    derive,
    describe_kept,
    layer_tensors,
    pack_two_four_experts,
    read_header,
    stored_tensors,
    unpack_two_four_experts,
    write_tensors,
)
from sparselong.compress import fewer_experts
from sparselong.compress.calibration import HiddenStates, calibration_tokens
from sparselong.compress.finished import check_finished, describe_finished
from sparselong.compress.layer import CalibratedLayer
from sparselong.compress.report import describe_sizes, measure
from sparselong.config import Config
from sparselong.data import conversations
from sparselong.errors import StageError
from sparselong.figures import format_bytes
from sparselong.files import point_to, read_json, write_atomically
from sparselong.memory import check_model
from sparselong.model import SparseLongConfig, implementation, settle_template
from sparselong.provenance import are_rows, describe_files, read_peaks, reset_peaks
from sparselong.run import Stage
from sparselong.runtime import compute_dtype, default_device, using
from sparselong.tiny import Inputs, open_inputs

DENSE_FILE = "dense-{:05d}.safetensors"
MASTER_FILE = "layer-{:05d}.safetensors"
LAYER_RECORD = "layer-{:05d}.json"
BASE_RECORD, MODEL_RECORD = "base.json", "model.json"
_RECORDED = ("calibration_sequences", "relative_error", "peak_bytes", "stored", "masters")
"""Keys of a layer's record; with `experts.keep`, `experts` is another."""
_ROWS = ("files", "stored", "masters")
"""Keys that hold rows of `describe_files`, in any record."""


def checkpoint_name(config: Config) -> str:
    """Return the checkpoint's name, made from the base and the compression.

    For example: gpt-oss-120b-w4a16-experts-4bit-2of4.
    """
    dense, experts = config.shared_dense, config.experts
    parts = [Path(config.model.base).name, f"w{dense.weight_bits}a16"]
    parts.append("experts-4bit" if experts.sparsity == "none" else "experts-4bit-2of4-dense")
    if experts.keep is not None:
        parts.append(f"keep{experts.keep}")
    if dense.sparsity == "2:4":
        parts.append("2of4")
    return "-".join(parts)


def compress(stage: Stage) -> None:
    """Compress the configured base checkpoint into `02_compress/model`.

    Raises:
        StageError: the checkpoint or the data is unusable.
    """
    inputs = _open_inputs(stage)
    base, stage.date = inputs.base, inputs.encoded.date
    if stage.config.experts.keep is not None:
        stage.log(f"warning: {fewer_experts.WARNING}")
    record_base(stage, base)
    reset_peaks()
    device = default_device()
    model = stage.dir / "model"
    if not model.exists():  # if it exists, it is complete
        backend, deterministic = stage.config.attention_backend, stage.config.deterministic
        with using(attention_backend=backend, deterministic=deterministic):
            _compress_layers(stage, inputs, device)
        _complete(stage, inputs)
    rows = _read_own(stage.dir / "work" / MODEL_RECORD, "files")["files"]
    check_finished(stage, model, rows)  # before it is opened
    _publish(stage, base, Checkpoint(model))


def _open_inputs(stage: Stage) -> Inputs:
    """Return the checked inputs; if a row is refused, a corrected file may replace it.

    Prepared rows must not change once something was made of them, but nothing has been yet.
    """

    def forget_rows() -> None:
        if not (stage.dir / "work").exists():
            conversations.forget(stage.run_dir)

    inputs = open_inputs(stage.config, stage.run_dir, stage.log, forget_rows)
    check_model(stage.config)  # again, for a base that was downloaded just now
    return inputs


def record_base(stage: Stage, base: Checkpoint) -> None:
    """Record the base's files before the first layer is read, and compare with them afterwards.

    Layers that were compressed before an interruption must be of the same base as the others.

    Raises:
        StageError: the base has changed since this stage began.
    """
    path = stage.dir / BASE_RECORD
    if path.exists():
        rows = _read_own(path, "files")["files"]
        check_recorded(base.inventory, rows, stage.name)
        stage.described += rows
        return
    paths = base.inventory.paths
    size = sum(path.stat().st_size for path in paths)
    stage.log(f"hashing the base checkpoint ({len(paths)} files, {format_bytes(size)})")
    rows = []
    stage.report("file hashed", 0, len(paths))
    for number, file in enumerate(paths, start=1):
        rows += describe_files([file], stage.run_dir)
        stage.report("file hashed", number, len(paths))
    write_atomically(path, json.dumps({"files": rows}, indent=1) + "\n")
    stage.described += rows


def _read_own(path: Path, *keys: str) -> dict[str, Any]:
    """Return the JSON object with these keys that this stage wrote."""
    again = "restore the file, or redo the stage: python 02_compress.py --force"
    document = read_json(path, again)
    lacking = [
        key for key in keys if key not in document or (key in _ROWS and not are_rows(document[key]))
    ]
    if lacking:
        raise StageError(
            f"{path} is damaged", f"{', '.join(keys)}", f"no valid {', '.join(lacking)}", again
        )
    return document


def _compress_layers(stage: Stage, inputs: Inputs, device: torch.device) -> None:
    """Compress the layers that are not finished yet."""
    base, architecture, _, encoded = inputs
    for folder in ("model.partial", "masters", "work"):
        (stage.dir / folder).mkdir(exist_ok=True)
    for name in ("lm_head.weight", "model.norm.weight"):  # others are checked when used
        for _ in base.read_slices(name):
            pass
    tokens = calibration_tokens(stage.config, encoded.train)
    states = HiddenStates(stage.dir / "work" / "states.safetensors")
    states.start(base, tokens, compute_dtype(device))
    stage.log(
        f"{tokens.shape[0]} calibration sequences of {tokens.shape[1]} tokens on {device}; "
        f"{states.layers_done} of {architecture.num_hidden_layers} layers already done"
    )
    _check_layers(stage, states.layers_done)
    stage.report("layer", states.layers_done, architecture.num_hidden_layers)
    for index in range(states.layers_done, architecture.num_hidden_layers):
        _compress_layer(stage, base, architecture, index, states, device)
        states.save(index + 1)
        host, *gpus = read_peaks().values()
        peak = format_bytes(max(gpus, default=host))
        stage.report("layer", index + 1, architecture.num_hidden_layers, f"peak {peak}")


def _check_layers(stage: Stage, count: int) -> None:
    """Raise if a file of the first `count` layers has changed since its layer was finished."""
    for index in range(count):
        record = _read_own(stage.dir / "work" / LAYER_RECORD.format(index), *_RECORDED)
        check_finished(stage, stage.dir / "model.partial", record["stored"])
        check_finished(stage, stage.dir / "masters", record["masters"])


def _quantization(config: Config) -> SparseLongConfig:
    dense = config.shared_dense
    return SparseLongConfig(
        dense.weight_bits, dense.sparsity, dense.group_size, config.experts.sparsity
    )


def _compress_layer(
    stage: Stage,
    base: Checkpoint,
    architecture: GptOssConfig,
    index: int,
    states: HiddenStates,
    device: torch.device,
) -> None:
    """Compress one layer, write its files, and advance the states past it."""
    tensors = base.read(layer_tensors(architecture, index))
    stored: dict[str, torch.Tensor] = {}
    if stage.config.experts.sparsity == "2:4":
        stored |= _drop_half_of_experts(tensors)
    dtype, attention = compute_dtype(device), implementation(stage.config)
    layer = CalibratedLayer(architecture, index, tensors, device, dtype, attention)
    del tensors
    fmt = _quantization(stage.config).dense_format
    record: dict[str, Any] = {"calibration_sequences": len(states.states), "relative_error": {}}
    dense_file = stage.dir / "model.partial" / DENSE_FILE.format(index)
    master_file = stage.dir / "masters" / MASTER_FILE.format(index)
    if fmt.is_sparse or fmt.is_quantized:
        made = layer.compress(states.states, fmt, stage.config.calibration, stage.log)
        stored |= made.stored
        record["relative_error"] = made.relative_error
        write_tensors(master_file, made.masters)
    if stage.config.experts.keep is not None:
        sums = layer.score_experts(states.states)
        choice = fewer_experts.choose(sums, stage.config.experts.keep, index)
        fewer_experts.tell(choice, index, stage.log)
        stored |= choice.select(layer.keep_experts(choice.kept), stored)
        record["experts"] = choice.describe()
    if stored:
        write_tensors(dense_file, stored)
    record["stored"] = describe_finished(stage, dense_file.parent, [dense_file])
    record["masters"] = describe_finished(stage, master_file.parent, [master_file])
    states.states = layer.run(states.states)
    record["peak_bytes"] = read_peaks()
    write_atomically(stage.dir / "work" / LAYER_RECORD.format(index), json.dumps(record))


def _drop_half_of_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prune the experts in `tensors` to 2:4 in place and return the tensors to store."""
    stored = {}
    for name in [name for name in tensors if name.endswith("_blocks")]:
        kept, patterns = pack_two_four_experts(tensors[name])
        stem = name.removesuffix("_blocks")
        stored |= {f"{stem}_kept": kept, f"{stem}_patterns": patterns}
        tensors[name] = unpack_two_four_experts(kept, patterns)
    return stored


def _complete(stage: Stage, inputs: Inputs) -> None:
    """Add upstream's unchanged tensors, index and config, and rename the result to `model`."""
    base, architecture, tokenizer, _ = inputs
    quantization = _quantization(stage.config)
    fmt = quantization.dense_format
    partial, changed = stage.dir / "model.partial", _describe_experts(stage, base, architecture)
    final = GptOssConfig.from_dict({**architecture.to_dict(), **changed})
    wanted = stored_tensors(final, fmt, quantization.expert_sparsity)
    dropped = set(base.tensors) - set(wanted)
    added = sorted(partial.glob("dense-*"))
    dropped |= {name for path in added for name in read_header(path)}  # with the same names
    derive(base, partial, dropped, added, quantization.to_dict(), changed).check(wanted)
    settle_template(tokenizer, partial)
    _check_layers(stage, architecture.num_hidden_layers)
    rows = describe_finished(stage, partial, [partial])
    write_atomically(stage.dir / "work" / MODEL_RECORD, json.dumps({"files": rows}, indent=1))
    partial.rename(stage.dir / "model")


def _describe_experts(stage: Stage, base: Checkpoint, architecture: GptOssConfig) -> dict[str, Any]:
    """Return what config.json says otherwise than the base's if experts are dropped."""
    if stage.config.experts.keep is None:
        return {}
    kept = [record["experts"]["kept"] for record in _read_records(stage)]
    return describe_kept(base.config, architecture.num_local_experts, kept)


def _read_records(stage: Stage) -> list[dict[str, Any]]:
    """Return the records of all layers."""
    keys = [*_RECORDED, *(["experts"] if stage.config.experts.keep is not None else [])]
    paths = sorted((stage.dir / "work").glob("layer-*.json"))
    return [_read_own(path, *keys) for path in paths]


def _publish(stage: Stage, base: Checkpoint, model: Checkpoint) -> None:
    """Fill the manifest from the files on disk and delete the states."""
    record_base(stage, base)  # the base must not have changed meanwhile
    point_to(stage.dir / checkpoint_name(stage.config), "model", stage.log)
    records = _read_records(stage)
    for record in records:
        check_finished(stage, stage.dir / "masters", record["masters"])
    for peaks in [read_peaks(), *(record["peak_bytes"] for record in records)]:
        for device, peak in peaks.items():
            stage.peak_bytes[device] = max(peak, stage.peak_bytes.get(device, 0))
    stage.metrics |= {
        "name": checkpoint_name(stage.config),
        **measure(base, model, stage.dir / "masters"),
        **fewer_experts.summarize(records, stage.config.experts.keep),
        "relative_error": [record["relative_error"] for record in records],
        "calibration_sequences": records[0]["calibration_sequences"],
        "peak_host_bytes": stage.peak_bytes["host"],
        "peak_device_bytes": {k: v for k, v in stage.peak_bytes.items() if k != "host"},
    }
    stage.log(describe_sizes(stage.metrics))
    stage.inputs = [*base.inventory.paths, *conversations.prepare(stage.config, stage.run_dir)]
    stage.sources = conversations.find_sources(stage.config, stage.run_dir)
    stage.outputs = [model.directory, stage.dir / "masters"]
    (stage.dir / "work" / "states.safetensors").unlink(missing_ok=True)
