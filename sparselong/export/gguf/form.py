"""`gguf`: one file for llama.cpp. Experts keep their MXFP4 codes, the rest has the type asked for.

`--dense-type` says which: bf16 and f32 are exact; f16 is refused if a value overflows it; q8_0 is
within half a step; K-quants are written by llama.cpp's routines, and where rows are no multiple of
256 by the type that llama.cpp takes instead. The manifest has the type of each tensor.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselong.export.form import Work
from sparselong.export.gguf.types import (
    BITS,
    DENSE_TYPE,
    FILE,
    TYPED,
    check_dense_type,
    type_for_rows,
)
from sparselong.export.inputs import model_directory
from sparselong.figures import format_bytes
from sparselong.files import read_json
from sparselong.memory import base_groups, compressed_groups, compressed_shape
from sparselong.provenance import find_change
from sparselong.run import Stage, read_manifest

if TYPE_CHECKING:
    from sparselong.export.gguf.file import Layout
    from sparselong.export.gguf.reading import Errors
    from sparselong.export.source import Source

_SAME = ("config_hash", "made_from", "options")


class GgufFormat:
    """One GGUF file."""

    name = "gguf"
    summary = "one file for llama.cpp, experts in MXFP4"

    def check(self, stage: Stage) -> None:
        """Raise if the dense weights cannot be written in the type asked for."""
        check_dense_type(stage.options[DENSE_TYPE])

    def plan(self, stage: Stage) -> Work:
        """Return the file's bytes; gate_up is read twice, and the file compared after writing."""
        shape = compressed_shape(stage.config)
        choice = stage.options[DENSE_TYPE]
        weights = sum(
            BITS[type_for_rows(choice, columns)] * rows * columns * shape.layers
            for rows, columns in shape.projections.values()
        )
        tables = 2 * shape.embedding * BITS[type_for_rows(choice, shape.hidden)]
        groups = base_groups(shape)
        written = groups["experts"] + 2 * groups["small"] + int(weights + tables) // 8
        source = compressed_groups(shape, stage.config)
        read = sum(source.values()) + 2 * source["experts"] // 3
        return Work(written, 2 * read, file=FILE)

    def write(self, stage: Stage) -> None:
        """Write the file, unless another part of this run holds it."""
        from sparselong.export.gguf.encoding import check_range
        from sparselong.export.gguf.file import write_file

        path = _unfinished(stage)
        if (stage.dir / FILE).exists() or _link_twin(stage, path):
            return
        if path.exists() and path.stat().st_nlink > 1:
            path.unlink()  # a link of an earlier attempt, which must not be written to
        source, layout = _open(stage)
        check_range(source, layout.tensors)
        write_file(stage, path, source, layout)

    def verify(self, stage: Stage) -> dict[str, Any]:
        """Compare the file with its source, name it, and return types and errors."""
        from sparselong.errors import StageError
        from sparselong.export.gguf.reading import compare_file

        path, final = _unfinished(stage), stage.dir / FILE
        source, layout = _open(stage)
        try:
            digest, errors = compare_file(path if path.exists() else final, source, layout)
        except StageError as error:
            if not path.exists():  # named by an earlier attempt, and changed since
                fix = f"redo it: {stage.redo_command}"
                raise StageError(error.what, error.expected, error.found, fix) from error
            path.unlink()
            raise
        if path.exists():
            path.replace(final)
        status = final.stat()
        stage.described.append(
            {
                "path": str(final.absolute()),
                "bytes": status.st_size,
                "mtime_ns": status.st_mtime_ns,
                "sha256": digest,
            }
        )
        stage.log(f"{FILE}: {format_bytes(layout.size)}, {_describe_errors(errors)}")
        return {
            "tensors": len(layout.tensors),
            "tensor_types": _names_by_type(layout),
            "tensors_identical": not errors,
            **({"errors": errors} if errors else {}),
        }


def _describe_errors(errors: Errors) -> str:
    if not errors:
        return "every value equal to its source's"
    largest = max(one["relative_rms"] for one in errors.values())
    return (
        f"{len(errors)} tensors rounded as asked (relative RMS up to {largest:.2%}), others equal"
    )


def _unfinished(stage: Stage) -> Path:
    return stage.dir / f"{FILE}.partial"


def _names_by_type(layout: Layout) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for tensor in layout.tensors:
        found.setdefault(tensor.kind, []).append(tensor.name)
    return found


def _open(stage: Stage) -> tuple[Source, Layout]:
    import torch

    from sparselong.export.gguf.file import plan_file
    from sparselong.export.source import Source

    source = Source(model_directory(stage), torch.device("cpu"))
    base = os.fsencode(Path(stage.config.model.base).name).decode(errors="replace")
    name = f"{base}, {stage.options['from']} by Sparse-Long"
    return source, plan_file(source, stage.options[DENSE_TYPE], name)


def _link_twin(stage: Stage, path: Path) -> bool:
    """Link the file from the other format's directory; return whether it is there.

    It is compared with its source like one that was written here.
    """
    twin = next(part for part in TYPED if part != stage.part)
    manifest = read_manifest(stage.run_dir, stage.name, twin)
    started = read_json(stage.dir / "started.json")
    if manifest is None or any(manifest.get(key) != started.get(key) for key in _SAME):
        return False
    row = next(row for row in manifest["outputs"] if Path(row["path"]).name == FILE)
    if find_change(stage.run_dir / row["path"], row):
        return False
    path.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(stage.dir.parent / twin / FILE), path)
    except OSError as error:
        stage.log(f"{twin}'s {FILE} cannot be linked ({error}): writing it again")
        return False
    stage.log(f"{FILE} is that of {twin}, linked")
    return True
