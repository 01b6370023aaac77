"""Comparison of installed packages with requirements/requirements.lock."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

LOCK = Path(__file__).resolve().parents[2] / "requirements" / "requirements.lock"

NEEDED = frozenset(
    (
        *("accelerate", "axolotl", "compressed-tensors", "datasets", "gguf", "huggingface-hub"),
        *("llmcompressor", "lm-eval", "matplotlib", "peft", "pydantic", "pyyaml", "rich"),
        *("safetensors", "tokenizers", "torch", "transformers"),
    )
)
"""Packages that the stages import directly; without any of them, some stage cannot start."""


@dataclass(frozen=True)
class Package:
    """A pinned package; `installed` is None if it is missing."""

    name: str
    pinned: str
    installed: str | None

    @property
    def matches(self) -> bool:
        """Whether the pinned version is installed, ignoring build tags such as `+cpu`."""
        return self.installed is not None and self.installed.partition("+")[0] == self.pinned


def is_installed(module: str) -> bool:
    """Return whether a top-level module can be found, without importing it.

    A folder without __init__.py, such as flash-attn-4's flash_attn, is not the module.
    """
    spec = util.find_spec(module)
    return spec is not None and spec.origin is not None


def compare_with_lock(lock: Path = LOCK) -> tuple[Package, ...]:
    """Return every package that the lock pins for this machine; none if there is no lock."""
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
