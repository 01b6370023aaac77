"""Base model and data: whether they are on this machine, can be made, or are on the hub.

Files and the hub cache are checked first. The hub is queried only for what is not on this machine,
with a timeout of a few seconds, and never if HF_HUB_OFFLINE is set. Nothing is downloaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparselong.checkpoint import missing_files
from sparselong.config import Config, ModelSection
from sparselong.files import is_local, load_json, why_unusable
from sparselong.health.packages import is_installed
from sparselong.memory import find_config
from sparselong.tiny import find_tiny

State = Literal["here", "made", "reachable", "missing", "unknown"]
_TIMEOUT_SECONDS = 4.0
_TASK_DATASETS = {"hellaswag": "Rowan/hellaswag"}
"""lm-eval task → hub dataset that it reads."""


@dataclass(frozen=True)
class Source:
    """A model or dataset that the config names.

    Attributes:
        role: its purpose, such as `base model`.
        name: its name in the config.
        state: `here`; `made` by a stage; `reachable` on the hub; `missing`; `unknown`.
        detail: one line saying where it is, or why it is missing.
        gated: whether the hub requires accepting its licence.
        licence: licence according to the hub.
        account: hub account whose token is set; None without a token.
        path: directory of a model on this machine.
    """

    role: str
    name: str
    state: State
    detail: str
    gated: bool = False
    licence: str = ""
    account: str | None = None
    path: Path | None = None


def _cache_home() -> Path:
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")


def hub_cache() -> Path:
    """Return the directory of the hub cache, as huggingface_hub does, without importing it."""
    return Path(os.environ.get("HF_HUB_CACHE") or _cache_home() / "hub")


def probe_sources(config: Config, run_dir: Path) -> tuple[Source, tuple[Source, ...]]:
    """Return the base model and every dataset that the stages read."""
    hub = _Hub()
    base = _base(config, run_dir, hub)
    data = [_data("training data", share.source, run_dir, hub) for share in config.data.shares]
    if config.data.validation:
        data.append(_data("validation data", config.data.validation, run_dir, hub))
    data += [_task(name, hub) for name in config.evaluation.tasks]
    return base, tuple(data)


def _base(config: Config, run_dir: Path, hub: _Hub) -> Source:
    role, name = "base model", config.model.base
    if name == "tiny":
        made = find_tiny(config, run_dir)
        if made is None:
            return Source(role, name, "made", "created and trained by stage 02")
        return Source(role, name, "here", f"in {made}", path=made)
    if os.path.isdir(name):
        return Source(role, name, "here", f"directory {name}", path=Path(name))
    if is_local(name):
        return Source(role, name, "missing", why_unusable(name, "directory"))
    cached = _cached_checkpoint(config.model)
    if cached:
        return Source(role, name, "here", f"in the hub cache, {cached}", path=cached)
    return hub.ask(role, name, "model", config.model.revision)


def _cached_checkpoint(model: ModelSection) -> Path | None:
    """Return the snapshot directory if all files of the checkpoint are in the hub cache."""
    config = find_config(model) if is_installed("huggingface_hub") else None
    return None if config is None or missing_files(config.parent) else config.parent


def _data(role: str, name: str, run_dir: Path, hub: _Hub) -> Source:
    if name == "demo":
        return Source(role, name, "made", "made from the Python library's documentation")
    if _is_prepared(name, run_dir):
        return Source(role, name, "here", f"prepared in {run_dir / 'data'}")
    if os.path.isfile(name):
        return Source(role, name, "here", f"file of {Path(name).stat().st_size:,} bytes")
    if is_local(name):
        return Source(role, name, "missing", why_unusable(name, "file"))
    return _dataset(role, name, hub)


def _is_prepared(name: str, run_dir: Path) -> bool:
    """Return whether an earlier stage of this run prepared its data from this source."""
    record = run_dir / "data" / "source.json"
    if not record.is_file():
        return False
    try:
        config = load_json(record)["config"]
        train = config["train"]
        named = [train] if isinstance(train, str) else [each["source"] for each in train]
        return name in (*named, config["validation"])
    except (OSError, ValueError, KeyError, TypeError):  # opening the rows explains it
        return False


def _task(task: str, hub: _Hub) -> Source:
    role = f"evaluation task {task}"
    if task.startswith("demo_"):
        return Source(role, task, "made", "made from the demo's held-out text")
    if task not in _TASK_DATASETS:
        return Source(role, task, "unknown", "its dataset is only known in stage 04")
    return _dataset(role, _TASK_DATASETS[task], hub)


def _dataset(role: str, name: str, hub: _Hub) -> Source:
    datasets_cache = Path(os.environ.get("HF_DATASETS_CACHE") or _cache_home() / "datasets")
    prepared = datasets_cache / name.replace("/", "___")
    for folder in (prepared, hub_cache() / f"datasets--{name.replace('/', '--')}" / "snapshots"):
        if folder.is_dir() and any(folder.iterdir()):
            return Source(role, name, "here", f"in the cache, {folder}")
    return hub.ask(role, name, "dataset", "main")


class _Hub:
    """Queries to the hub, which stop after the first failure to connect."""

    def __init__(self) -> None:
        self._unreachable = "" if is_installed("huggingface_hub") else "huggingface_hub is missing"
        if not self._unreachable and _is_offline():
            self._unreachable = "HF_HUB_OFFLINE is set"

    def ask(self, role: str, name: str, kind: Literal["model", "dataset"], revision: str) -> Source:
        """Return the hub's answer for a repository: reachable or missing, gated, licence."""
        if self._unreachable:
            return Source(role, name, "missing", f"not on this machine, and {self._unreachable}")
        import httpx
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        api = HfApi()
        try:
            info = api.repo_info(name, repo_type=kind, revision=revision, timeout=_TIMEOUT_SECONDS)
        except HFValidationError:
            return Source(role, name, "missing", "neither a local file or directory nor a hub name")
        except HfHubHTTPError as error:
            return Source(role, name, "missing", f"the hub refused: {_reason(error)}")
        except (httpx.HTTPError, OSError) as error:
            self._unreachable = f"the hub cannot be reached ({_reason(error)})"
            return Source(role, name, "missing", f"not on this machine, and {self._unreachable}")
        gated = bool(getattr(info, "gated", False))
        card = getattr(info, "card_data", None)
        return Source(
            role,
            name,
            "reachable",
            "on the hub, will be downloaded when first needed",
            gated=gated,
            licence=str(getattr(card, "license", None) or ""),
            account=_account() if gated else None,
        )


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _account() -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        return str(HfApi().whoami()["name"])
    except (HfHubHTTPError, LocalTokenNotFoundError):
        return None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
