"""Writing the GGUF file: header by the gguf package, tensors streamed behind it.

The header fixes where each tensor begins, so that an interrupted file is continued after its last
whole tensor. The file is called model.gguf.partial until it was compared with its source
(reading.py). It is removed if the disk is full.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.gguf_writer import WriterState

from sparselong.errors import StageError
from sparselong.export.gguf.encoding import encoded_parts
from sparselong.export.gguf.layout import Tensor, list_tensors, padded
from sparselong.export.gguf.metadata import ARCHITECTURE, add_keys
from sparselong.export.gguf.types import FILE
from sparselong.export.shards import check_space
from sparselong.export.source import Source
from sparselong.run import Stage


class Layout(NamedTuple):
    """What the file holds, and where.

    Attributes:
        header: its first bytes, padded.
        keys: names and values of its keys.
        tensors: in the order of the file.
        begins: offset of each tensor in the file.
        size: bytes of the whole file.
    """

    header: bytes
    keys: dict[str, object]
    tensors: list[Tensor]
    begins: list[int]
    size: int


def plan_file(source: Source, choice: str, name: str) -> Layout:
    """Return the layout of the file.

    Args:
        source: the model.
        choice: type of the dense weights, a key of `DENSE_TYPES`.
        name: of the model, for people.

    Raises:
        StageError: llama.cpp cannot compute this model or read its tokenizer.
    """
    writer = GGUFWriter(None, ARCHITECTURE)
    add_keys(writer, source.architecture, source.checkpoint.directory, name)
    tensors = list_tensors(source.shapes, choice)
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.kind]
        # The numpy type says that `shape` counts elements, not bytes.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype("f4"), tensor.size, kind)
    keys = {key: entry.value for key, entry in writer.kv_data[0].items()}
    header = _make_header(writer)
    begins, end = [], len(header)
    for tensor in tensors:
        begins.append(end)
        end += padded(tensor.size)
    return Layout(header, keys, tensors, begins, end)


def _make_header(writer: GGUFWriter) -> bytes:
    """Return the file's first bytes, up to the first tensor."""
    buffer = io.BytesIO()
    writer.fout, writer.state = [buffer], WriterState.EMPTY  # pyright: ignore
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    found = buffer.getvalue()
    return found.ljust(padded(len(found)), b"\0")


def write_file(stage: Stage, path: Path, source: Source, layout: Layout) -> None:
    """Write the file, or what is missing of it.

    Args:
        stage: for messages.
        path: of the unfinished file.
        source: the model.
        layout: result of `plan_file`.

    Raises:
        StageError: the disk has too little space, or a value overflows its type.
    """
    done = _count_whole(path, layout)
    begin = layout.begins[done] if done else 0
    check_space(stage, layout.size - begin)
    try:
        with path.open("r+b" if done else "wb") as file:
            file.truncate(begin)
            file.seek(begin)
            if not done:
                file.write(layout.header)
            else:
                stage.log(f"{FILE}: {done} of {len(layout.tensors)} tensors are kept")
            stage.report("tensor", done, len(layout.tensors))
            for number, tensor in enumerate(layout.tensors[done:], start=done + 1):
                for part in encoded_parts(source, tensor):
                    file.write(part.data.numpy().data)
                file.write(bytes(padded(tensor.size) - tensor.size))
                stage.report("tensor", number, len(layout.tensors))
            file.flush()
            os.fsync(file.fileno())
    except (OSError, StageError):
        path.unlink(missing_ok=True)
        raise


def _count_whole(path: Path, layout: Layout) -> int:
    """Return how many tensors of an interrupted file are whole; all but the last one of them."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        same = file.read(len(layout.header)) == layout.header
    size = path.stat().st_size if same else 0
    return max(0, sum(begin <= size for begin in layout.begins) - 1)
