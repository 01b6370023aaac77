"""What an export would read and write: the document of `--dry-run`. No torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparselong.export.form import Work
from sparselong.export.formats import find_format
from sparselong.export.hub import HUB, plan_upload
from sparselong.export.inputs import model_directory
from sparselong.figures import format_bytes, format_seconds
from sparselong.memory import compressed_groups, compressed_shape, find_rate
from sparselong.run import Stage, read_manifest

_DECODED_PER_SECOND = 5e7
"""MXFP4 weights that two processor cores decode and write per second."""
_HASHED_PER_SECOND = 1e9
"""Bytes that a core hashes and compares per second."""


def plan_export(stages: list[Stage]) -> dict[str, Any]:
    """Return what the parts would do; changes nothing.

    Raises:
        StageError: the base model's shape is unknown.
    """
    config = stages[0].config
    works = _plan_works(stages)
    seconds = {name: round(_seconds(work)) for name, work in works.items()}
    model = sum(compressed_groups(compressed_shape(config), config).values())
    writes = [
        {
            "path": str(stage.dir),
            "bytes": works[stage.part].written_bytes,
            "what": find_format(stage.part).summary,
        }
        for stage in stages
    ]
    source = f"the {stages[0].options['from']} model"
    return {
        "stage": stages[0].name,
        "status": "plan",
        "device": "cpu",
        "reads": [{"path": str(model_directory(stages[0])), "bytes": model, "what": source}],
        "writes": writes,
        "bytes_on_disk": sum(work.written_bytes for work in works.values()),
        "bytes_per_gpu": {},
        "peak_bytes_per_gpu": 0,
        "estimated_seconds": sum(seconds.values()),
        "estimated_seconds_by_part": seconds,
        "notes": [
            f"{'; '.join(f'{name}: {format_seconds(each)}' for name, each in seconds.items())}.",
            "Times are estimates for 2 processor cores and a disk of 0.5 GB per second. Every file "
            "is read back and compared before it counts as written.",
            *_note_upload(works),
        ],
        "config": config.model_dump(mode="json"),
    }


def _plan_works(stages: list[Stage]) -> dict[str, Work]:
    """Return each part's work; a file that several parts share is written by the first."""
    works: dict[str, Work] = {}
    made: dict[str, int] = {}
    for stage in stages:
        if stage.part == HUB:
            works[HUB] = plan_upload(stage, made)
            continue
        work = find_format(stage.part).plan(stage)
        if stage.forced or read_manifest(stage.run_dir, stage.name, stage.part) is None:
            made[stage.part] = work.written_bytes
        if work.file and work.file in [each.file for each in works.values()]:
            work = replace(work, written_bytes=0, read_bytes=work.read_bytes // 2)
        works[stage.part] = work
    return works


def _note_upload(works: dict[str, Work]) -> list[str]:
    uploaded = sum(work.uploaded_bytes for work in works.values())
    if not uploaded:
        return []
    return [f"{format_bytes(uploaded)} are uploaded, for which no time is estimated."]


def _seconds(work: Work) -> float:
    rate = find_rate(None)
    moved = work.read_bytes + 2 * work.written_bytes  # written, and read back
    return (
        rate.startup.compress
        + moved / rate.disk_bytes_per_second
        + 2 * work.written_bytes / _HASHED_PER_SECOND
        + work.decoded_weights / _DECODED_PER_SECOND
    )
