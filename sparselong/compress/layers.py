"""The stream of layers: read, calibrate, compress, write; each part beside those of other layers.

    reading    layer n + 1, in a thread            (reading.py)
    computing  layer n                             (layer.py)
    writing    layer n - 1 and its states, in a thread: packed tensors, masters, hashes, states
    hashing    the base's files, in a thread       (reading.py)

One layer is on the device, the next one and the states before and after a layer are in host memory.
A layer's files appear in this order, each atomically: packed tensors, masters, the record with
their hashes, the states after the layer. If the process is killed at any moment, the next run
resumes after the last layer whose states were saved and recomputes the layers after it to the same
bytes. An error in a thread is raised when the computation needs what the thread makes.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from sparselong.checkpoint import write_tensors
from sparselong.compress import fewer_experts
from sparselong.compress.background import Background, Seconds
from sparselong.compress.calibration import STATES, HiddenStates
from sparselong.compress.finished import read_own
from sparselong.compress.layer import CalibratedLayer
from sparselong.compress.reading import BaseFiles, LayerReader
from sparselong.compress.work import Work
from sparselong.config import Config
from sparselong.errors import ConfigError
from sparselong.figures import format_bytes
from sparselong.files import write_atomically
from sparselong.memory import compress_batch_tokens
from sparselong.model import SparseLongConfig, implementation
from sparselong.provenance import describe_files, refuse_changes
from sparselong.runtime import compute_dtype

DENSE_FILE = "dense-{:05d}.safetensors"
MASTER_FILE = "layer-{:05d}.safetensors"
LAYER_RECORD = "layer-{:05d}.json"
RECORDED = (
    *("calibration_sequences", "relative_error", "attention_error"),
    *("peak_bytes", "stored", "masters", "seconds"),
)
"""Keys of a layer's record; with `experts.keep`, `experts` is another."""


def quantization(config: Config) -> SparseLongConfig:
    """Return how the compressed checkpoint is stored."""
    dense = config.shared_dense
    return SparseLongConfig(
        dense.weight_bits, dense.sparsity, dense.group_size, config.experts.sparsity
    )


def compress_layers(work: Work, device: torch.device) -> int:
    """Compress the layers of `work` that are not finished yet, and return how many layers are.

    Raises:
        StageError: the base is damaged or has changed, or a layer cannot be compressed.
        ConfigError: layers before those of `work` are not finished.
    """
    sequences, length = work.tokens.shape
    states = HiddenStates(
        work.folder / "work" / STATES,
        (sequences, length, work.architecture.hidden_size),
        compute_dtype(device),
        device,
        compress_batch_tokens(work.config, "cuda" if device.type == "cuda" else "cpu"),
        work.spread,
    )
    states.start(work.base, work.tokens)
    done, count = states.layers_done, work.architecture.num_hidden_layers
    work.tell(
        f"{sequences} calibration sequences of {length} tokens on {device}; "
        f"{done} of {count} layers already done"
    )
    _check_layers(work, done)
    _warn_of_few_tokens(work)
    work.progress(done, count, "")
    if done >= work.layers.stop:
        return done
    with LayerStream(work, states, device) as stream:
        for index in range(done, work.layers.stop):
            stream.compress(index)
            host, *gpus = work.peaks().values()
            work.progress(index + 1, count, f"peak {format_bytes(max(gpus, default=host))}")
        stream.finish()
    return work.layers.stop


def _check_layers(work: Work, done: int) -> None:
    """Raise unless the layers before those of `work` are finished and as they were recorded."""
    if done < work.layers.start:
        raise ConfigError(
            f"--layers begins after layers that are not finished in {work.folder}",
            f"at most {done}, the number of finished layers",
            f"--layers {work.layers.start}:{work.layers.stop}",
            f"pass --layers {done}:{work.layers.stop}",
        )
    for index in range(done):
        record = read_own(work.folder / "work" / LAYER_RECORD.format(index), *RECORDED)
        refuse_changes(record["stored"], work.folder / "model.partial", work.folder.name)
        refuse_changes(record["masters"], work.folder / "masters", work.folder.name)


def _warn_of_few_tokens(work: Work) -> None:
    """Warn of fewer sequences than were asked for, and of Hessians singular but for dampening."""
    sizes, tokens = work.architecture, work.tokens.numel()
    found, wanted = len(work.tokens), work.config.calibration.samples
    if found < wanted:
        work.tell(
            f"warning: the training data fills {found} of the {wanted} sequences of "
            "calibration.samples"
        )
    inputs = max(sizes.hidden_size, sizes.num_attention_heads * sizes.head_dim)
    if tokens < inputs:
        work.tell(
            f"warning: {tokens:,} calibration tokens tell little of projections with {inputs:,} "
            "inputs: raise calibration.samples or calibration.sequence_len"
        )


@dataclass
class _Made:
    """A layer that was compressed and is being written.

    Attributes:
        index: the layer's index.
        stored: tensors of the compressed checkpoint by name.
        masters: dense masters by name; empty if the format needs none.
        record: the layer's record so far.
        seconds: of the parts that the computation waited for.
        beside: of the parts in threads.
    """

    index: int
    stored: dict[str, torch.Tensor]
    masters: dict[str, torch.Tensor]
    record: dict[str, Any]
    seconds: Seconds
    beside: Seconds = field(default_factory=Seconds)


class LayerStream:
    """Layers on their way through reading, computing and writing.

    Args:
        work: what is compressed.
        states: those before the first of the layers.
        device: where layers are computed.
    """

    def __init__(self, work: Work, states: HiddenStates, device: torch.device):
        self._work, self._states, self._device = work, states, device
        self._format = quantization(work.config).dense_format
        self._blocks = ExitStack()
        self._written: _Made | None = None

    def __enter__(self) -> LayerStream:
        with ExitStack() as blocks:
            self._reader = blocks.enter_context(
                LayerReader(self._work.base, self._work.architecture, self._device)
            )
            self._writer = blocks.enter_context(Background())
            self._files: BaseFiles | None = None
            if self._work.spread.is_first:
                work = self._work
                files = BaseFiles(work.base, work.folder, work.run_dir)
                self._files = blocks.enter_context(files)
                if files.unrecorded_bytes:
                    size = format_bytes(files.unrecorded_bytes)
                    work.tell(f"hashing {size} of the base checkpoint beside the layers")
                files.begin()
            self._reader.begin(self._states.layers_done)
            self._blocks = blocks.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._blocks.__exit__(kind, error, trace)

    def compress(self, index: int) -> None:
        """Compress a layer, take the states past it, and begin to write it.

        Raises:
            StageError: see `compress_layers`.
        """
        made, layer = self._read(index)
        if self._format.is_sparse or self._format.is_quantized:
            calibration, spread = self._work.config.calibration, self._work.spread
            found = layer.compress(self._states, self._format, calibration, spread, made.seconds)
            made.stored |= found.stored
            made.masters |= found.masters
            made.record["relative_error"] = found.relative_error
            made.record["attention_error"] = found.attention_error
        if self._work.config.experts.keep is not None:
            self._drop_experts(made, layer, self._work.config.experts.keep)
        with made.seconds.measuring("forward"):
            layer.run(self._states)
        with made.seconds.measuring("wait"):
            self._commit()
        self._states.begin_saving()
        self._writer.start(self._write, made)
        self._written = made
        self._tell(made)

    def finish(self) -> None:
        """Wait until the last layer is written, and the base's files are recorded.

        Raises:
            StageError: a file of the base was changed since it was opened.
        """
        self._commit()
        if self._files is not None:
            self._files.settle(None if self._is_last else self._states.layers_done - 1)

    @property
    def _is_last(self) -> bool:
        return self._states.layers_done == self._work.architecture.num_hidden_layers

    def _read(self, index: int) -> tuple[_Made, CalibratedLayer]:
        """Return the layer on the device, and begin to read the next."""
        work, device = self._work, self._device
        record = {"calibration_sequences": len(work.tokens)}
        record |= {"relative_error": {}, "attention_error": {}}
        made = _Made(index, {}, {}, record, Seconds(device))
        with made.seconds.measuring("load"):
            tensors, made.beside.by_part["read"] = self._reader.take()
            dtype, attention = compute_dtype(device), implementation(work.config)
            layer = CalibratedLayer(work.architecture, index, tensors, device, dtype, attention)
        if index + 1 < work.layers.stop:
            self._reader.begin(index + 1)
        if work.config.experts.sparsity == "2:4":
            with made.seconds.measuring("pack"):
                made.stored |= layer.prune_experts()
        return made, layer

    def _drop_experts(self, made: _Made, layer: CalibratedLayer, keep: int) -> None:
        """Keep the experts with the highest scores over all processes' states."""
        with made.seconds.measuring("score"):
            sums = layer.score_experts(self._states, self._work.spread)
            choice = fewer_experts.choose(sums, keep, made.index)
            made.stored |= choice.select(layer.keep_experts(choice.kept), made.stored)
        made.record["experts"] = choice.describe()
        fewer_experts.tell(choice, made.index, self._work.tell)

    def _write(self, made: _Made) -> None:
        """Write a layer's files and this process's states after it; run in a thread."""
        if self._work.spread.is_first:
            folder = self._work.folder
            dense = folder / "model.partial" / DENSE_FILE.format(made.index)
            master = folder / "masters" / MASTER_FILE.format(made.index)
            with made.beside.measuring("write"):
                for path, tensors in ((dense, made.stored), (master, made.masters)):
                    if tensors:
                        write_tensors(path, tensors)
            with made.beside.measuring("hash"):
                made.record["stored"] = describe_files([dense], dense.parent)
                made.record["masters"] = describe_files([master], master.parent)
        self._states.save(made.beside)

    def _commit(self) -> None:
        """Finish the layer that is being written: its record, then the states after it."""
        self._writer.join()
        made, self._written = self._written, None
        if made is None:
            return
        self._work.spread.wait("layer written")
        made.record["peak_bytes"] = self._work.peaks()
        if self._files is not None:
            self._files.settle(made.index)
            made.record["seconds"] = made.seconds.by_part | made.beside.by_part
            path = self._work.folder / "work" / LAYER_RECORD.format(made.index)
            write_atomically(path, json.dumps(made.record))
        self._states.commit()

    def _tell(self, made: _Made) -> None:
        errors = [f"{name} {error:.4f}" for name, error in made.record["relative_error"].items()]
        refined = made.record["attention_error"]
        self._work.tell(
            f"layer {made.index}: {', '.join(errors) or 'kept'} relative error; "
            + (
                "attention {solved:.4f}, refined {refined:.4f}; ".format(**refined)
                if refined
                else ""
            )
            + ", ".join(f"{part} {value:.2f} s" for part, value in made.seconds.by_part.items())
        )
