"""The health check's probes, on fake programs and files."""

import os
from pathlib import Path

import pytest

from sparselong.health import inputs, packages, sources
from sparselong.health import machine as machine_module
from sparselong.health.machine import Gpu
from sparselong.health.packages import Package
from sparselong.provenance import is_our_environment
from tests.conftest import ROOT
from tests.health.machines import BIG, TINY, failures, judge, load, machine


def fake_program(folder: Path, name: str, text: str, code: int = 0) -> None:
    program = folder / name
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
    program.chmod(0o755)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


TWO = (
    "0, NVIDIA GeForce RTX 3090, 8.6, 24576, 24258, 570.86.10, 4, 16\n"
    "1, NVIDIA H200, 9.0, 143771, 143000, 570.86.10, [N/A], [N/A]"
)


def test_nvidia_smi_is_read(programs, monkeypatch):
    fake_program(programs, "nvidia-smi", TWO)
    gpus, driver = machine_module.probe_gpus()
    assert driver == "570.86.10"
    assert gpus[0] == Gpu(
        0, "NVIDIA GeForce RTX 3090", (8, 6), 24576 * 2**20, 24258 * 2**20, "4.0 x16"
    )
    assert gpus[1].name == "NVIDIA H200" and gpus[1].pcie == "unknown"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [g.index for g in machine_module.probe_gpus()[0]] == [1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine_module.probe_gpus()[0] == ()


def test_no_driver_is_no_gpu(programs):
    fake_program(programs, "nvidia-smi", "NVIDIA-SMI has failed because", 9)
    assert machine_module.probe_gpus() == ((), None)


def test_another_environment_is_distinguished_from_ours(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.prefix", str(ROOT / ".venv"))
    assert is_our_environment()
    monkeypatch.setattr("sys.prefix", str(tmp_path / ".venv"))
    assert not is_our_environment()


def test_disk_space_is_that_of_the_nearest_existing_parent(tmp_path):
    disk = machine_module.probe_disk(tmp_path / "not/there/yet")
    stats = os.statvfs(tmp_path)
    assert disk.path == tmp_path
    assert disk.free_bytes == pytest.approx(stats.f_bavail * stats.f_frsize, rel=0.05)


def test_hard_links_are_counted_once(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1000))
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").symlink_to("a")
    assert machine_module._tree_bytes(tmp_path) == 1000
    assert machine_module._tree_bytes(tmp_path / "none") == 0


def test_lock_is_compared_with_what_is_installed(tmp_path):
    import pydantic

    lock = tmp_path / "requirements.lock"
    lock.write_text(
        "# a comment\n"
        f"pydantic=={pydantic.__version__}\n"
        "PyYAML==0.0.1 ; python_full_version < '4'\n"
        "no-such-package==1.0  # why\n"
        "only-on-windows==1.0 ; sys_platform == 'win32'\n"
    )
    rows = {row.name: row for row in packages.compare_with_lock(lock)}
    assert set(rows) == {"pydantic", "pyyaml", "no-such-package"}
    assert rows["pydantic"].matches and not rows["pyyaml"].matches
    assert rows["no-such-package"].installed is None
    assert packages.compare_with_lock(tmp_path / "none") == ()
    assert Package("torch", "2.13.0", "2.13.0+cu130").matches
    assert not Package("torch", "2.13.0", "2.13.01").matches


def test_a_folder_without_init_is_not_a_package(tmp_path, monkeypatch):
    (tmp_path / "half_a_package/part").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert not packages.is_installed("half_a_package")
    (tmp_path / "half_a_package/__init__.py").touch()
    assert packages.is_installed("half_a_package")
    assert not packages.is_installed("no_such_package")


def test_the_lock_pins_everything_the_stages_need():
    assert packages.NEEDED <= {row.name for row in packages.compare_with_lock()}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache and no network."""
    monkeypatch.setattr(sources, "_is_offline", lambda: True)
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


def states(config, run_dir: Path) -> dict[str, str]:
    base, data = sources.probe_sources(config, run_dir)
    return {source.role: source.state for source in (base, *data)}


def test_offline_hub_names_are_missing_and_local_ones_are_not(offline, untrained_base, chat_file):
    assert states(BIG, offline) == {
        "base model": "missing",
        "training data": "missing",
        "evaluation task hellaswag": "missing",
    }
    base, _ = sources.probe_sources(BIG, offline)
    assert "HF_HUB_OFFLINE" in base.detail
    local = load("tiny", f"model.base={untrained_base}", f"data.train={chat_file}")
    assert set(states(local, offline).values()) == {"here", "made"}
    assert states(TINY, offline)["base model"] == "made"
    lost = load("tiny", "data.train=./nowhere.jsonl", "data.validation=/nowhere", "seed=1")
    assert states(lost, offline)["training data"] == "missing"
    assert states(lost, offline)["validation data"] == "missing"
    (offline / "HF_DATASETS_CACHE/HuggingFaceH4___Multilingual-Thinking/default").mkdir(
        parents=True
    )
    assert states(BIG, offline)["training data"] == "here"


def test_prepared_data_of_the_run_is_available(offline, chat_file):
    from sparselong.data import conversations

    config = load("tiny", f"data.train={chat_file}")
    conversations.prepare(config, offline)
    _, data = sources.probe_sources(config, offline)
    assert data[0].state == "here" and "prepared" in data[0].detail
    assert states(BIG, offline)["training data"] == "missing"


def test_a_base_directory_that_lacks_a_shard_fails_as_in_stage_02(
    offline, tmp_path, untrained_base, chat_file
):
    copy = tmp_path / "base"
    copy.mkdir()
    for file in untrained_base.iterdir():
        os.link(file, copy / file.name)
    config = load("tiny", f"model.base={copy}", f"data.train={chat_file}")
    shard = sorted(copy.glob("model-*.safetensors"))[0]
    shard.unlink()
    base, data = sources.probe_sources(config, offline)
    findings = inputs.probe_inputs(config, offline, base, data[:1])
    assert [finding.role for finding in findings if finding.error] == ["base checkpoint"]
    facts = machine(base=base, data=data, inputs=findings)
    assert failures(config, facts) == {"base checkpoint"}
    assert shard.name in judge(config, facts)["base checkpoint"].found


def test_rows_that_no_template_has_seen_are_a_limitation(offline, chat_file):
    config = load("tiny", "model.base=openai/gpt-oss-120b", f"data.train={chat_file}")
    base, data = sources.probe_sources(config, offline)
    findings = inputs.probe_inputs(config, offline, base, data[:1])
    row = judge(config, machine(base=base, data=data, inputs=findings))["conversations"]
    assert row.status == "warn" and "not encoded" in row.found and "tokenizer" in row.fix


def test_an_unresponsive_hub_is_queried_once(offline, monkeypatch):
    import httpx
    from huggingface_hub import HfApi

    asked = []

    def refuse(self, name, **options):
        asked.append((name, options["timeout"]))
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(sources, "_is_offline", lambda: False)
    monkeypatch.setattr(HfApi, "repo_info", refuse)
    base, data = sources.probe_sources(BIG, offline)
    assert asked == [("openai/gpt-oss-120b", 4.0)]
    assert {base.state, *(source.state for source in data)} == {"missing"}
    assert "no route" in data[0].detail
