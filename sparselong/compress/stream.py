"""Stage 02: the base checkpoint in, the compressed one and the masters out.

layers.py compresses layer by layer, in this process or, under torchrun, in one for each GPU
(rank.py). This module opens the inputs before and completes and publishes the result after it.

    02_compress/model.partial/     grows; renamed to model/ when complete
    02_compress/masters/           dense bf16 masters by layer, for stage 03
    02_compress/work/              states (removed at the end), per-layer records with the hashes of
                                   the layer's files, model.json with those of the whole model
    02_compress/base.json          sizes, times and hashes of the base's files
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from transformers import GptOssConfig

from sparselong.checkpoint import (
    Checkpoint,
    check_recorded,
    derive,
    describe_kept,
    read_header,
    stored_tensors,
)
from sparselong.compress import fewer_experts
from sparselong.compress.calibration import STATES, calibration_tokens
from sparselong.compress.finished import check_finished, describe_finished, read_own
from sparselong.compress.layers import LAYER_RECORD, RECORDED, compress_layers, quantization
from sparselong.compress.reading import BASE_RECORD
from sparselong.compress.report import add_seconds, describe_sizes, measure
from sparselong.compress.work import RANKS, TOKENS, Spread, Work, compress_together
from sparselong.config import Config
from sparselong.data import conversations
from sparselong.files import point_to, write_atomically
from sparselong.memory import check_layers, check_model
from sparselong.model import settle_template
from sparselong.processes import is_joined
from sparselong.provenance import read_peaks, reset_peaks
from sparselong.run import Stage
from sparselong.runtime import default_device, using
from sparselong.tiny import Inputs, open_inputs

MODEL_RECORD = "model.json"


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

    If the command is for some of the layers only, the stage is finished by a later one.

    Raises:
        StageError: the checkpoint or the data is unusable.
        ConfigError: layers before those of the command are not finished.
    """
    inputs = _open_inputs(stage)
    check_layers(stage.config, stage.layers)  # again: the base may have been downloaded meanwhile
    base, stage.date = inputs.base, inputs.encoded.date
    if stage.config.experts.keep is not None:
        stage.log(f"warning: {fewer_experts.WARNING}")
    reset_peaks()
    model = stage.dir / "model"
    if not model.exists():  # if it exists, it is complete
        done, count = _compress_layers(stage, inputs), inputs.architecture.num_hidden_layers
        if done < count:
            stage.unfinished = {"layers_done": done, "layers": count}
            return
        _complete(stage, inputs)
    rows = read_own(stage.dir / "work" / MODEL_RECORD, "files")["files"]
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


def _compress_layers(stage: Stage, inputs: Inputs) -> int:
    """Compress the layers that are not finished yet; return how many are."""
    base, architecture, _, encoded = inputs
    for folder in ("model.partial", "masters", "work"):
        (stage.dir / folder).mkdir(exist_ok=True)
    for name in ("lm_head.weight", "model.norm.weight"):  # others are checked when used
        for _ in base.read_slices(name):
            pass
    work = Work(
        config=stage.config,
        run_dir=stage.run_dir,
        folder=stage.dir,
        base=base,
        architecture=architecture,
        tokens=calibration_tokens(stage.config, encoded.train),
        layers=stage.layers or range(architecture.num_hidden_layers),
        spread=Spread(),
        tell=stage.log,
        progress=partial(stage.report, "layer"),
        peaks=read_peaks,
    )
    if is_joined():
        return compress_together(stage, work)
    backend, deterministic = stage.config.attention_backend, stage.config.deterministic
    with using(attention_backend=backend, deterministic=deterministic):
        return compress_layers(work, default_device())


def _check_layers(stage: Stage, count: int) -> None:
    """Raise if a file of the first `count` layers has changed since its layer was finished."""
    for index in range(count):
        record = read_own(stage.dir / "work" / LAYER_RECORD.format(index), *RECORDED)
        check_finished(stage, stage.dir / "model.partial", record["stored"])
        check_finished(stage, stage.dir / "masters", record["masters"])


def _check_base(stage: Stage, base: Checkpoint) -> float:
    """Raise if the base has changed since it was recorded; return what hashing it took.

    Raises:
        StageError: the base has changed since this stage began.
    """
    record = read_own(stage.dir / BASE_RECORD, "files", "seconds")
    check_recorded(base.inventory, record["files"], stage.name)
    stage.described += record["files"]
    return record["seconds"]


def _complete(stage: Stage, inputs: Inputs) -> None:
    """Add upstream's unchanged tensors, index and config, and rename the result to `model`."""
    base, architecture, tokenizer, _ = inputs
    storage = quantization(stage.config)
    partial, changed = stage.dir / "model.partial", _describe_experts(stage, base, architecture)
    final = GptOssConfig.from_dict({**architecture.to_dict(), **changed})
    wanted = stored_tensors(final, storage.dense_format, storage.expert_sparsity)
    dropped = set(base.tensors) - set(wanted)
    added = sorted(partial.glob("dense-*"))
    dropped |= {name for path in added for name in read_header(path)}  # with the same names
    derive(base, partial, dropped, added, storage.to_dict(), changed).check(wanted)
    settle_template(tokenizer, partial)
    _check_layers(stage, architecture.num_hidden_layers)
    _check_base(stage, base)  # notes the hashes of linked shards
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
    keys = [*RECORDED, *(["experts"] if stage.config.experts.keep is not None else [])]
    paths = sorted((stage.dir / "work").glob("layer-*.json"))
    return [read_own(path, *keys) for path in paths]


def _publish(stage: Stage, base: Checkpoint, model: Checkpoint) -> None:
    """Fill the manifest from the files on disk and delete the states."""
    hashing_seconds = _check_base(stage, base)  # it must not have changed meanwhile
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
        **{
            key: [record[key] for record in records]
            for key in ("relative_error", "attention_error")
        },
        "seconds_by_part": add_seconds(records, hashing_seconds),
        "calibration_sequences": records[0]["calibration_sequences"],
        "peak_host_bytes": stage.peak_bytes["host"],
        "peak_device_bytes": {k: v for k, v in stage.peak_bytes.items() if k != "host"},
    }
    stage.log(describe_sizes(stage.metrics))
    stage.inputs = [*base.inventory.paths, *conversations.prepare(stage.config, stage.run_dir)]
    stage.sources = conversations.find_sources(stage.config, stage.run_dir)
    stage.outputs = [model.directory, stage.dir / "masters"]
    for name in (STATES, RANKS, TOKENS):
        (stage.dir / "work" / name).unlink(missing_ok=True)
