"""Installed packages against requirements/requirements.lock."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

LOCK = Path(__file__).resolve().parents[2] / "requirements" / "requirements.lock"

NEEDED = frozenset(
    (
        *("accelerate", "axolotl", "compressed-tensors", "datasets", "huggingface-hub"),
        *("llmcompressor", "lm-eval", "matplotlib", "peft", "pydantic", "pyyaml", "rich"),
        *("safetensors", "tokenizers", "torch", "transformers"),
    )
)
"""What the stages import themselves: without one of these, some stage cannot start."""


@dataclass(frozen=True)
class Package:
    """A pinned package; `installed` is None where it is missing."""

    name: str
    pinned: str
    installed: str | None

    @property
    def matches(self) -> bool:
        """Whether the pinned version is there; `+cpu` and the like name a build of it."""
        return self.installed is not None and self.installed.partition("+")[0] == self.pinned


def is_installed(module: str) -> bool:
    """Whether a top-level module could be imported; imports nothing."""
    return util.find_spec(module) is not None


def compare_with_lock(lock: Path = LOCK) -> tuple[Package, ...]:
    """Every package that the lock pins for this machine; nothing where there is no lock."""
    from packaging.requirements import Requirement  # comes with pip, and with transformers

    if not lock.is_file():
        return ()
    rows = []
    for line in lock.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip().removesuffix("\\").strip()
        if not text or text.startswith("-"):
            continue
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        pinned = next(iter(requirement.specifier)).version.partition("+")[0]
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = None
        rows.append(Package(requirement.name.lower().replace("_", "-"), pinned, installed))
    return tuple(rows)
