"""What `03_finetune.py --dry-run` says about profiles, and about time and cost by type of GPU."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from sparselong.config.profiles import PROFILES
from tests.conftest import ROOT, load_script

Plan = Callable[..., dict[str, Any]]


@pytest.fixture
def planned(capsys, tmp_path) -> Plan:
    """The document of a dry run of stage 03 for gpt-oss-20b; with `text`, what people read."""
    script = load_script("03_finetune")
    lines = (ROOT / "configs/gpt-oss-20b-1x3090.yaml").read_text(encoding="utf-8").splitlines()
    config = tmp_path / "20b.yaml"  # the shipped one, without the keys that profiles set
    config.write_text("\n".join(x for x in lines if not x.startswith(("profile", "sequence_len"))))

    def plan(*overrides: str) -> dict[str, Any]:
        arguments = ["--config", str(config), *overrides, "--run-dir", str(tmp_path / "run")]
        assert script.main([*arguments, "--dry-run"]) == 0
        text = capsys.readouterr().out
        assert script.main([*arguments, "--dry-run", "--json"]) == 0
        return {**json.loads(capsys.readouterr().out), "text": text}

    return plan


def hours(document: dict[str, Any]) -> float:
    return document["estimates"][0]["hours"]


@pytest.mark.parametrize("name", PROFILES)
def test_a_plan_shows_what_the_profile_changes(planned, name):
    made = planned(f"profile={name}")
    shown = {row["key"]: row["profile"] for row in made["profile"]["sets"]}
    assert made["profile"]["name"] == name and shown == PROFILES[name]
    (title,) = (line for line in made["text"].splitlines() if line.startswith("Profile "))
    assert title.startswith(f"Profile {name}") and (":" in title) == (not shown)
    for row in made["profile"]["sets"]:
        value: Any = made["config"]
        for part in row["key"].split("."):
            value = value[part]
        assert value == row["used"] == row["profile"] != row["default"]
        (line,) = (line for line in made["text"].splitlines() if f"  {row['key']} " in line)
        assert line.endswith(f" {row['used']} (default {row['default']})")


def test_profiles_are_what_their_names_say(planned):
    plans = {name: planned(f"profile={name}", "sequence_len=16384") for name in PROFILES}
    assert hours(plans["quick_test"]) < hours(plans["standard"]) / 2
    assert hours(plans["high_quality"]) > hours(plans["standard"]) * 2
    kept = ["training.keep_attention=never", "training.keep_experts=never"]
    efficient = planned("profile=memory_efficient", *kept)
    assert efficient["config"]["sequence_len"] == 4096
    least = efficient["peak_bytes_per_gpu"]
    for other in (planned("sequence_len=4096", *kept), planned("lora.r=8", *kept)):
        assert least < other["peak_bytes_per_gpu"]


def test_a_key_that_is_set_replaces_the_profiles_value_and_the_plan_says_so(planned):
    made = planned("profile=memory_efficient", "sequence_len=8192")
    (row,) = (row for row in made["profile"]["sets"] if row["key"] == "sequence_len")
    assert (row["used"], row["profile"], row["default"]) == (8192, 4096, 16384)
    assert " 8192, set in place of the profile's 4096\n" in made["text"]


def test_time_and_cost_are_estimated_for_each_type_of_gpu_with_a_price(planned):
    made = planned("cost.per_gpu_hour={H200: 3.5, RTX 3090: 0.25}", "sequence_parallel_degree=4")
    h200, small = made["estimates"]
    assert [(row["gpu"], row["gpus"]) for row in (h200, small)] == [("H200", 4), ("RTX 3090", 4)]
    assert 3 < small["hours"] / h200["hours"] < 14  # not the whole of it is arithmetic
    assert small["hours"] == pytest.approx(made["estimated_seconds"] / 3600, rel=1e-3)
    for row, price in ((h200, 3.5), (small, 0.25)):
        assert row["gpu_hours"] == pytest.approx(4 * row["hours"])
        assert row["cost"] == pytest.approx(price * row["gpu_hours"])
        assert f"4 x {row['gpu']} " in made["text"] and f"cost {row['cost']:,.2f}" in made["text"]


def test_without_types_the_planned_gpu_takes_the_price_and_a_processor_none(planned):
    (row,) = planned("cost.per_gpu_hour=2")["estimates"]
    assert row["gpu"] == "RTX 3090" and row["cost"] == pytest.approx(2 * row["gpu_hours"])
    unknown = planned()
    assert unknown["estimates"][0]["cost"] is None
    assert "cost not known: set cost.per_gpu_hour" in unknown["text"]
    (row,) = planned("model.base=tiny", "flash_attention=false")["estimates"]
    assert (row["gpus"], row["gpu_hours"], row["cost"]) == (0, 0, None)
